"""How text is cut into words before byte-level BPE, by the names that GGUF's `tokenizer.ggml.pre` has for it.

The names are llama.cpp's (`llama-vocab.cpp`). The patterns are those of the models' own `tokenizer.json`, which transformers uses;
so are the normal forms, which GGUF files do not state.
"""

from dataclasses import dataclass

from tokenizers import Regex, normalizers, pre_tokenizers

from meshd.errors import ModelFileError
from meshd.models.files.gguf_header import MetadataValue

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_BEFORE = r"[^\r\n\p{L}\p{N}]?"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_CL100K = rf"{_CONTRACTIONS}|{_BEFORE}\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
_QWEN2 = _CL100K.replace("{1,3}", "")
_QWEN35 = rf"{_CONTRACTIONS}|{_BEFORE}[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}"
_O200K = (
    rf"{_BEFORE}{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|{_BEFORE}{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
    rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
)
_TEKKEN = rf"{_BEFORE}{_UPPER}*{_LOWER}+|{_BEFORE}{_UPPER}+{_LOWER}*|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_ONE_DIGIT = r"\p{N}"
_LLAMA_CPP_DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")
"""No model's own: what llama.cpp takes where a file names nothing better."""


@dataclass(frozen=True, slots=True)
class PretokenizerRule:
    """One way to cut text into words."""

    patterns: tuple[str, ...]
    """Each cuts what the one before has left, into its matches and what lies between them."""
    composed: bool = False
    """Text is brought into Unicode's normal form NFC first."""
    whole_words: bool = False
    """A word that is a token is that token, whatever the merges say."""
    begins: bool = False
    """A text begins with BOS, unless the file says otherwise."""

    def normalizer(self) -> normalizers.Normalizer | None:
        """None: text is taken as it is."""
        return normalizers.NFC() if self.composed else None

    def pre_tokenizer(self) -> pre_tokenizers.PreTokenizer:
        """Cuts words, and spells them as GPT-2 spells bytes."""
        cuts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in self.patterns]
        return pre_tokenizers.Sequence([*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


_CUTS = {
    PretokenizerRule((_GPT2,)): "gpt-2 phi-2 exaone4 granite-docling",
    PretokenizerRule((_GPT2,), composed=True): "olmo mpt",
    PretokenizerRule((_ONE_DIGIT, _GPT2)): "smollm starcoder refact codeshell exaone",
    PretokenizerRule((_ONE_DIGIT, _GPT2), composed=True): "command-r",
    PretokenizerRule((_CL100K,), whole_words=True, begins=True): "llama-bpe llama3 llama-v3 falcon3 pixtral lfm2",
    PretokenizerRule((_CL100K,)): "dbrx smaug-bpe",
    PretokenizerRule((_QWEN2,), composed=True): "qwen2 deepseek-r1-qwen megrez",
    PretokenizerRule((_QWEN35,), composed=True): "qwen35",
    PretokenizerRule((_O200K,)): "gpt-4o llama4 kanana2",
    PretokenizerRule((_TEKKEN,), whole_words=True, begins=True): "tekken",
    PretokenizerRule(_LLAMA_CPP_DEFAULT): "default",
}
_BY_NAME = {name: cut for cut, names in _CUTS.items() for name in names.split()}


def pretokenizer_named(pre: MetadataValue | None) -> PretokenizerRule:
    """The cut that a GGUF file names. Raises: ModelFileError for one that is not known, or missing."""
    if isinstance(pre, str) and pre in _BY_NAME:
        return _BY_NAME[pre]
    if pre is None:
        raise ModelFileError(
            "the tokenizer can't be used: tokenizer.ggml.pre is missing, so that nothing says how text is cut into words",
            hint="the file is of before April 2024; convert the model again",
        )
    known = ", ".join(sorted(_BY_NAME))
    raise ModelFileError(f"pre-tokenizer {pre!r} can't be used: only {known} are known", hint="try smollm2:135m")
