"""The rules that split text into words before byte-level BPE, by their names in GGUF's `tokenizer.ggml.pre`.

The names are llama.cpp's (`llama-vocab.cpp`). The patterns, and whether text is converted to NFC, are those of the models' own
`tokenizer.json` or code. Not here: rules without GPT-2's byte alphabet (gemma4, sarvam-moe, whitespace), and those of models that
only embed texts and end them with a separator (jina-v1-en, jina-v2-code, roberta-bpe).
"""

from dataclasses import dataclass
from difflib import get_close_matches

from tokenizers import Regex, normalizers, pre_tokenizers

from meshd.errors import ModelFileError
from meshd.models.files.gguf_header import MetadataValue
from meshd.models.text.tokenizer import patterns as p

DEFAULT = "default"
"""The rule for files that name none, which are older than April 2024. No model was trained with it."""


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
    PretokenizerRule((p.GPT2,)): (
        "gpt-2 phi-2 exaone4 granite-docling jais trillion gigachat a.x-4.0 mellum modern-bert "
        "jina-es jina-de jina-v2-es jina-v2-de"
    ),
    PretokenizerRule((p.GPT2,), nfc=True): "olmo mpt",
    PretokenizerRule((p.ONE_DIGIT, p.GPT2)): "smollm starcoder refact codeshell exaone minerva-7b mellum2",
    PretokenizerRule((p.ONE_DIGIT, p.GPT2), nfc=True): "command-r",
    PretokenizerRule((p.CL100K,), whole_words=True, adds_bos=True): (
        "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral lfm2 midm-2.0 jina-v5-nano"
    ),
    PretokenizerRule((p.CL100K,)): "dbrx smaug-bpe glm4 chatglm-bpe",
    PretokenizerRule((p.JAIS2,)): "jais-2",
    PretokenizerRule((p.THREE_DIGITS, p.MINICPM5), whole_words=True): "minicpm5",
    PretokenizerRule((p.QWEN2,), nfc=True): "qwen2 deepseek-r1-qwen megrez f2llmv2 stablelm2 hunyuan",
    PretokenizerRule((p.QWEN2,)): "kormo grok-2 solar-open",
    PretokenizerRule((p.LINES, p.QWEN2)): "laguna",
    PretokenizerRule((p.QWEN2_WHOLE_SUFFIXES,)): "ufakzeka",
    PretokenizerRule((p.QWEN35,), nfc=True): "qwen35",
    PretokenizerRule((p.SEED_CODER,)): "seed-coder",
    PretokenizerRule((p.BAILING,)): "bailingmoe bailingmoe2 llada-moe",
    PretokenizerRule((p.EXAONE_MOE,)): "exaone-moe",
    PretokenizerRule((p.O200K,)): "gpt-4o llama4 kanana2 talkie minimax-m2",
    PretokenizerRule((p.O200K,), whole_words=True): "granite-embed-multi-97m",
    PretokenizerRule((p.THREE_DIGITS_BEFORE_WORD_END, p.O200K)): "tiny_aya cohere2moe",
    PretokenizerRule((p.YOUTU, p.O200K_ONE_DIGIT), whole_words=True): "youtu",
    PretokenizerRule((p.TEKKEN,), whole_words=True, adds_bos=True): "tekken",
    PretokenizerRule((p.KIMI,)): "kimi-k2",
    PretokenizerRule(p.DEEPSEEK_LLM): "deepseek-llm",
    PretokenizerRule(p.DEEPSEEK_CODER): "deepseek-coder",
    PretokenizerRule((p.THREE_DIGITS, p.CHINESE_JAPANESE, p.DEEPSEEK)): "deepseek-v3 hunyuan-dense joyai-llm hy_v4",
    PretokenizerRule((p.THREE_DIGITS, p.CHINESE_JAPANESE, p.SPARK, p.ONE_DIGIT)): "spark2_5",
    PretokenizerRule((p.THREE_DIGITS_FROM_RIGHT, p.ASIAN, p.DEEPSEEK)): "afmoe",
    PretokenizerRule((r"\p{N}+", p.THREE_DIGITS_FROM_RIGHT)): "superbpe",
    PretokenizerRule((p.BLOOM,)): "poro-chat bloom gpt3-finnish",
    PretokenizerRule((p.BLOOM, p.ONE_DIGIT)): "viking",
    PretokenizerRule((p.PUNCTUATION_AND_BACKTICK, p.GPT2, r"\p{N}+", "[0-9]{3}")): "falcon",
    PretokenizerRule(p.CHAMELEON, adds_bos=True): "chameleon",
    PretokenizerRule((p.PUNCTUATION, p.GPT2, r"\p{N}+", "[0-9]{3}")): "default",
}
_BY_NAME = {name: rule for rule, names in _RULES.items() for name in names.split()}


NAMES = tuple(_BY_NAME)
"""Names of all rules."""


def pretokenizer_named(pre: MetadataValue | None) -> PretokenizerRule:
    """Return the rule that a GGUF file names; the rule `default` if it names none. Raises: ModelFileError for an unknown name."""
    if isinstance(pre, str | None) and (pre or DEFAULT) in _BY_NAME:
        return _BY_NAME[pre or DEFAULT]
    near = get_close_matches(str(pre), _BY_NAME, n=3) or ["llama-bpe", "qwen2", "gpt-2"]
    raise ModelFileError(
        f"pre-tokenizer {pre!r} can't be used: meshd does not know this rule, of {len(_BY_NAME)} that it knows",
        hint=f"if the model's words are split as by one of {', '.join(near)}, convert it again with that name",
    )
