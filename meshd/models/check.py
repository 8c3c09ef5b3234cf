"""Check from its header alone that a model could answer, so that no gigabytes are fetched for one that can't."""

from meshd.errors import ModelFileError
from meshd.models.cards import LEFT_OUT, card_from_gguf, prediction_tensors
from meshd.models.files.gguf import GgufFile
from meshd.models.text.worker.check import check_text
from meshd.types import ModelCard, ModelId

_NO_ID = "0" * 32
"""The id in the card of a model whose file is not hashed yet."""
_OTHER_FILES = {
    "clip": "a projector for images or sound (mmproj)",
    "mmproj": "a projector for images or sound (mmproj)",
    "imatrix": "an importance matrix, which tools use to quantise a model",
    "adapter": "an adapter (LoRA), which changes another model",
    "vocab": "a vocabulary without a network",
}
"""Values of `general.type` and `general.architecture` of GGUF files that hold no language model, and what they hold."""


def check_model(file: GgufFile, *, name: str = "", ref: str = "", model_id: str = _NO_ID) -> ModelCard:
    """Check a model's network, tokenizer and chat template. `file` may be a header without the weights. Takes up to seconds.

    Returns: the model's card. Raises: ModelFileError, which names the file.
    """
    for key in ("general.type", "general.architecture"):
        other = _OTHER_FILES.get(str(file.metadata.get(key)))
        if other is not None:
            raise ModelFileError(f"{file.name} can't be run: it is {other}", hint="take the file of the model itself")
    parts = file.metadata.get("split.count", 1)
    if isinstance(parts, int) and parts > 1:
        number = file.metadata.get("split.no")
        which = f"part {number + 1} of {parts}" if isinstance(number, int) else f"one of {parts} parts"
        raise ModelFileError(
            f"{file.name} can't be run: it is {which} of a split file",
            hint=f"put all parts into one folder, named NAME-00001-of-{parts:05}.gguf and so on, and name the first",
        )
    card = card_from_gguf(file, name=name, ref=ref, model_id=ModelId(model_id))
    if problem := check_text(file.header_bytes()):
        why, _, hint = problem.partition("; ")
        raise ModelFileError(f"{file.name} can't be run: {why}", hint=hint)
    return card


def notes_on(file: GgufFile) -> list[str]:
    """List what of a model is not used, to tell the user."""
    left_out = file.metadata.get(LEFT_OUT, 0)
    ahead = len(prediction_tensors(file)) or (left_out if isinstance(left_out, int) else 0)
    about = f"{ahead} tensors that predict several tokens ahead (MTP, nextn) are ignored: the answers are the same, not faster"
    return [about] if ahead else []
