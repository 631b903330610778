"""Chat requests to prompts: DeepSeek's own encoding wherever vLLM renders a V3.2 conversation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

from transformers import TokenizersBackend

from dsv32_plugin import apis
from dsv32_plugin.core import chat, prompt_tokens
from dsv32_plugin.vllm_adapter.upstream import (
    ChatCompletionMessageParam,
    ChatParams,
    ConversationMessage,
    DictPrompt,
    HfRenderer,
    HfTokenizer,
    VllmConfig,
    get_cached_tokenizer,
    make_async,
    parse_dec_only_prompt,
)


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
        self.variant = chat.variant(self.model_config.model, str(self.model_config.served_model_name))
        if tokenizer is not None and not getattr(tokenizer, "chat_template", None):
            prompt_tokens.check(tokenizer)

    def render_messages(
        self, messages: list[ChatCompletionMessageParam], params: ChatParams
    ) -> tuple[list[ConversationMessage], DictPrompt]:
        if self._has_template(params):
            return super().render_messages(messages, params)
        conversation = _plain(messages)
        return conversation, parse_dec_only_prompt(self._encode(conversation, params, apis.current()))

    async def render_messages_async(
        self, messages: list[ChatCompletionMessageParam], params: ChatParams
    ) -> tuple[list[ConversationMessage], DictPrompt]:
        if self._has_template(params):
            return await super().render_messages_async(messages, params)
        conversation = _plain(messages)
        # Asked for here: the encoder runs in a thread, which knows nothing of the request being served.
        ids = await self._encode_async(conversation, params, apis.current())
        return conversation, parse_dec_only_prompt(ids)

    def _has_template(self, params: ChatParams) -> bool:
        return self.has_template(params.chat_template)

    def has_template(self, chat_template: str | None) -> bool:
        """Whether conversations are rendered by a template: this one, or the checkpoint's."""
        return bool(chat_template or getattr(self.get_tokenizer(), "chat_template", None))

    def _encode(
        self, messages: list[ConversationMessage], params: ChatParams, conversation: apis.Conversation | None
    ) -> list[int]:
        tokenizer = self.get_tokenizer()
        count = partial(prompt_tokens.count, tokenizer)
        prompt = apis.rendered(conversation, messages, params.chat_template_kwargs, self.variant, count)
        return prompt_tokens.encode(tokenizer, prompt)


def _plain(value: Any) -> Any:
    """Dicts and lists where pydantic left lazy iterators, which can be read only once."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, Iterable) and not isinstance(value, str):
        return [_plain(item) for item in value]
    return value
