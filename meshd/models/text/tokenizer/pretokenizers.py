"""The rules that split text into words before byte-level BPE, by their names in GGUF's `tokenizer.ggml.pre`.

The names are llama.cpp's (`llama-vocab.cpp`). The patterns are those of the models' own `tokenizer.json`, which transformers uses.
Whether text is converted to NFC also follows `tokenizer.json`, since GGUF files do not state it.
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
"""llama.cpp's fallback rule. No model was trained with it."""


@dataclass(frozen=True, slots=True)
class PretokenizerRule:
    """A rule that splits text into words."""

    patterns: tuple[str, ...]
    """Regular expressions, applied in order. Each one splits the parts from the previous one into matches and the text between."""
    nfc: bool = False
    """Whether text is first converted to Unicode's normal form NFC."""
    whole_words: bool = False
    """Whether a whole word that is a token is encoded as that token, without BPE merges."""
    adds_bos: bool = False
    """Default of GGUF's `add_bos_token`: whether a text begins with BOS."""

    def normalizer(self) -> normalizers.Normalizer | None:
        """Build the normalizer. Returns: None if the rule does not normalize text."""
        return normalizers.NFC() if self.nfc else None

    def pre_tokenizer(self) -> pre_tokenizers.PreTokenizer:
        """Build the pre-tokenizer, which splits text into words and spells them in GPT-2's byte alphabet."""
        cuts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in self.patterns]
        return pre_tokenizers.Sequence([*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


_RULES = {
    PretokenizerRule((_GPT2,)): "gpt-2 phi-2 exaone4 granite-docling",
    PretokenizerRule((_GPT2,), nfc=True): "olmo mpt",
    PretokenizerRule((_ONE_DIGIT, _GPT2)): "smollm starcoder refact codeshell exaone",
    PretokenizerRule((_ONE_DIGIT, _GPT2), nfc=True): "command-r",
    PretokenizerRule((_CL100K,), whole_words=True, adds_bos=True): "llama-bpe llama3 llama-v3 falcon3 pixtral lfm2",
    PretokenizerRule((_CL100K,)): "dbrx smaug-bpe",
    PretokenizerRule((_QWEN2,), nfc=True): "qwen2 deepseek-r1-qwen megrez",
    PretokenizerRule((_QWEN35,), nfc=True): "qwen35",
    PretokenizerRule((_O200K,)): "gpt-4o llama4 kanana2",
    PretokenizerRule((_TEKKEN,), whole_words=True, adds_bos=True): "tekken",
    PretokenizerRule(_LLAMA_CPP_DEFAULT): "default",
}
_BY_NAME = {name: rule for rule, names in _RULES.items() for name in names.split()}


def pretokenizer_named(pre: MetadataValue | None) -> PretokenizerRule:
    """Return the rule that a GGUF file names. Raises: ModelFileError if the name is unknown or missing."""
    if isinstance(pre, str) and pre in _BY_NAME:
        return _BY_NAME[pre]
    if pre is None:
        raise ModelFileError(
            "the tokenizer can't be used: tokenizer.ggml.pre, the rule that splits text into words, is missing",
            hint="the file is older than April 2024; convert the model again",
        )
    known = ", ".join(sorted(_BY_NAME))
    raise ModelFileError(f"pre-tokenizer {pre!r} can't be used: only {known} are known", hint="try smollm2:135m")
