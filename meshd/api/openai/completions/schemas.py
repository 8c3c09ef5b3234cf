"""The bodies of `POST /v1/completions`, with the same fields as in OpenAI's API."""

from typing import Annotated, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from meshd.agents.service import GenerationRequest, MeshOptions
from meshd.api.openai.common_objects import FinishName, ObjectHeader, Usage
from meshd.api.openai.fields import UNSUPPORTED, GenerationFields, TokenId
from meshd.clock import Clock
from meshd.errors import InvalidRequest
from meshd.types import SamplingDefaults

DEFAULT_MAX_TOKENS = 16
"""OpenAI's default for this route."""

MAX_PROMPTS = 256
"""Most prompts of one request."""

Text = Annotated[str, Meta(min_length=1)]
TokenIds = Annotated[list[TokenId], Meta(min_length=1)]
Prompt = str | tuple[int, ...]


class CompletionRequest(GenerationFields, frozen=True, kw_only=True):
    """The body of POST /v1/completions."""

    prompt: Annotated[
        Text | Annotated[list[Text | TokenId | TokenIds], Meta(min_length=1)],
        Meta(description="A text, a list of texts, a list of token ids, or a list of such lists."),
    ]
    logprobs: Annotated[Annotated[int, Meta(ge=0, le=20)] | None, Meta(description="From 0 to 20.")] = None
    echo: Annotated[
        bool | None, Meta(description="Begin answers with the prompt, which must be text. Not together with `logprobs`.")
    ] = None
    best_of: Annotated[
        int | None, Meta(description="Not supported: only null or the value of `n`.", extra_json_schema={UNSUPPORTED: True})
    ] = None
    suffix: Annotated[
        Annotated[str, Meta(max_length=0)] | None,
        Meta(description="Not supported: only null or an empty text.", extra_json_schema={UNSUPPORTED: True}),
    ] = None

    def prompts(self) -> list[Prompt]:
        """Return the prompts, each as text or as token ids. Raises: InvalidRequest."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        texts = [item for item in self.prompt if isinstance(item, str)]
        ids = [item for item in self.prompt if isinstance(item, int)]
        lists = [tuple(item) for item in self.prompt if isinstance(item, list)]
        match bool(texts), bool(ids), bool(lists):
            case True, False, False:
                return [*texts]
            case False, True, False:
                return [tuple(ids)]
            case False, False, True:
                return [*lists]
        raise InvalidRequest("`prompt` mixes texts and token ids", param="prompt", hint="send one kind")

    def echoes(self) -> list[str]:
        """Return, for each prompt, the text that its answers begin with: the prompt, or nothing if `echo` is not requested."""
        return [prompt if self.echo and isinstance(prompt, str) else "" for prompt in self.prompts()]

    def check(self) -> None:
        """Check the rules that types can't express. Raises: InvalidRequest."""
        GenerationFields.check(self)
        # The first item decides: token ids of one prompt may be many. `prompts` refuses a mixture.
        if isinstance(self.prompt, list) and len(self.prompt) > MAX_PROMPTS and not isinstance(self.prompt[0], int):
            raise InvalidRequest(
                f"`prompt` has {len(self.prompt)} prompts, and {MAX_PROMPTS} are allowed", param="prompt", hint="send fewer at once"
            )
        if self.best_of is not None and self.best_of != self.count:
            raise InvalidRequest("`best_of` is not supported", param="best_of", hint="leave it out or send the value of `n`")
        if self.echo and self.logprobs is not None:
            raise InvalidRequest("`echo` with `logprobs` is not supported", param="echo", hint="leave one of them out")
        if self.echo and not all(isinstance(prompt, str) for prompt in self.prompts()):
            raise InvalidRequest("`echo` needs the prompt as text", param="echo", hint="send `prompt` as text or leave `echo` out")

    def generation_requests(self, clock: Clock, defaults: SamplingDefaults) -> list[GenerationRequest]:
        """Make `n` requests to the coordinator for each prompt. Raises: InvalidRequest."""
        self.check()
        seeds = self.seeds(clock)
        return [
            GenerationRequest(
                model=self.model,
                prompt=prompt,
                sampling=self.sampling(seed, self.logprobs, defaults),
                max_tokens=self.max_tokens or DEFAULT_MAX_TOKENS,
                stop=self.stops(),
                ignore_eos=bool(self.ignore_eos),
                mesh=self.mesh or MeshOptions(),
            )
            for prompt in self.prompts()
            for seed in seeds
        ]


class CompletionLogprobs(msgspec.Struct, frozen=True, kw_only=True):
    """Logprobs of the tokens of an answer or a chunk: lists with one item for each token."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    """Logprobs of the most likely tokens and of the chosen token. null: `logprobs` is 0."""
    text_offset: list[int]
    """Number of characters in the answer before each token."""


class CompletionChoice(msgspec.Struct, frozen=True, kw_only=True):
    """One complete answer or, in a stream, a part of one answer."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishName | None


class Completion(ObjectHeader, frozen=True, kw_only=True):
    """All answers to one request, or one event of a stream. With `include_usage`, the last event has the usage and no choices."""

    object: Literal["text_completion"] = "text_completion"
    choices: list[CompletionChoice]
    usage: Usage | UnsetType | None = UNSET
