"""Chat requests to prompts: DeepSeek's own encoding wherever vLLM renders a V3.2 conversation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

from transformers import TokenizersBackend
from vllm.config import ModelConfig, VllmConfig
from vllm.entrypoints.chat_utils import ChatCompletionMessageParam, ConversationMessage
from vllm.renderers.hf import HfRenderer
from vllm.renderers.inputs import DictPrompt
from vllm.renderers.inputs.preprocess import parse_dec_only_prompt
from vllm.renderers.params import ChatParams
from vllm.tokenizers.hf import HfTokenizer, get_cached_tokenizer
from vllm.utils.async_utils import make_async

from dsv32_plugin import settings
from dsv32_plugin.parsers import encode_messages
from dsv32_plugin.parsers.encoding import Variant
from dsv32_plugin.thinking import thinking_requested

SPECIALE: Literal["speciale"] = "speciale"
_ENCODER_OPTIONS = ("tools", "response_format", "drop_thinking", "add_generation_prompt", "continue_final_message")


class DsaTokenizer:
    """The checkpoint's tokenizer.json as it is; the class named in tokenizer_config.json would change its rules."""

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> HfTokenizer:
        return get_cached_tokenizer(TokenizersBackend.from_pretrained(*args, **kwargs))


class DsaRenderer(HfRenderer):
    """Renders with `encode_messages`; a chat template, where the checkpoint or the request brings one, is obeyed.

    V3.2 ships no template. V3.2-Exp ships the older V3.1 template, which is the format it was trained on.
    """

    def __init__(self, config: VllmConfig, tokenizer: HfTokenizer | None) -> None:
        super().__init__(config, tokenizer)
        self._encode_async = make_async(self._encode, executor=self._executor)
        self._variant = _variant(self.model_config)

    def render_messages(
        self, messages: list[ChatCompletionMessageParam], params: ChatParams
    ) -> tuple[list[ConversationMessage], DictPrompt]:
        if self._has_template(params):
            return super().render_messages(messages, params)
        conversation = _plain(messages)
        return conversation, parse_dec_only_prompt(self._encode(conversation, params))

    async def render_messages_async(
        self, messages: list[ChatCompletionMessageParam], params: ChatParams
    ) -> tuple[list[ConversationMessage], DictPrompt]:
        if self._has_template(params):
            return await super().render_messages_async(messages, params)
        conversation = _plain(messages)
        return conversation, parse_dec_only_prompt(await self._encode_async(conversation, params))

    def _has_template(self, params: ChatParams) -> bool:
        return bool(params.chat_template or getattr(self.get_tokenizer(), "chat_template", None))

    def _encode(self, messages: list[ConversationMessage], params: ChatParams) -> list[int]:
        kwargs = params.chat_template_kwargs
        if kwargs.get("documents"):
            raise ValueError("documents: expected none, got some; DeepSeek-V3.2 has no place for them, use a message")
        options = {name: kwargs[name] for name in _ENCODER_OPTIONS if kwargs.get(name) is not None}
        prompt = encode_messages(
            messages,
            thinking_mode="thinking" if thinking_requested(kwargs) else "chat",
            variant=self._variant,
            allow_developer=settings.allow_developer_role(),
            **options,
        )
        return self.get_tokenizer().encode(prompt, add_special_tokens=False)


def _variant(model_config: ModelConfig) -> Variant:
    name = f"{model_config.model} {model_config.served_model_name}".lower()
    return settings.variant() or (SPECIALE if SPECIALE in name else "v3.2")


def _plain(value: Any) -> Any:
    """Dicts and lists where pydantic left lazy iterators, which can be read only once."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, Iterable) and not isinstance(value, str):
        return [_plain(item) for item in value]
    return value
