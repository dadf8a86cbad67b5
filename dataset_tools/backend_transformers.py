"""A vision-language model in this process, through transformers; requests are generated in batches."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

from byg_plugin.config.extras import require

from .backend import Answer, Chat, redact
from .settings import BackendSettings

_GATHER = 0.05  # seconds that a batch waits to be filled


class TransformersBackend:
    """Any model that `AutoModelForImageTextToText` loads. One batch runs at a time, in a thread of its own."""

    def __init__(self, settings: BackendSettings):
        require("transformers", 'backend = "transformers"', "diffusers")
        require("torch", 'backend = "transformers"', "diffusers")
        if settings.load_4bit:
            require("bitsandbytes", "load_4bit", "bnb", "leave --load-4bit out")
        self.settings, self.model = settings, settings.model
        self._network, self._processor = load_model(settings)
        self._queue: asyncio.Queue[tuple[Chat, asyncio.Future[Answer]]] = asyncio.Queue()
        self._loop: asyncio.Task[None] | None = None

    async def complete(self, chat: Chat) -> Answer:
        """See `Backend`."""
        if self._loop is None:
            self._loop = asyncio.ensure_future(self._serve())
        answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        await self._queue.put((chat, answer))
        either: set[asyncio.Future[Any]] = {answer, self._loop}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            self._loop.result()  # the batch failed: its error is everybody's
        return answer.result()

    def scrub(self, text: str, chat: Chat) -> str:
        """See `Backend`."""
        return redact(text, [], chat)

    async def close(self) -> None:
        """Stop serving."""
        if self._loop is not None:
            self._loop.cancel()
            with suppress(asyncio.CancelledError, ValueError):
                await self._loop

    async def _serve(self) -> None:
        while True:
            batch = [await self._queue.get()]
            with suppress(asyncio.TimeoutError):
                while len(batch) < self.settings.batch_size:
                    batch.append(await asyncio.wait_for(self._queue.get(), _GATHER))
            answers = await asyncio.to_thread(self.generate, [chat for chat, _ in batch])
            for (_, future), answer in zip(batch, answers, strict=True):
                if not future.done():
                    future.set_result(answer)

    def generate(self, chats: list[Chat]) -> list[Answer]:
        """Answers of one batch.

        Raises:
            ValueError: the device has no memory for it.
        """
        import torch

        texts = [self._processor.apply_chat_template(_messages(chat), tokenize=False, add_generation_prompt=True) for chat in chats]
        images = [[picture.image() for picture in chat.pictures] for chat in chats]
        inputs = self._processor(text=texts, images=images if any(images) else None, padding=True, return_tensors="pt")
        inputs = inputs.to(self._network.device)
        torch.manual_seed(chats[0].seed)  # of the batch: what a chat is batched with depends on the others' speed
        sampling: dict[str, Any] = {"do_sample": False}
        if self.settings.temperature > 0:
            sampling = {"do_sample": True, "temperature": self.settings.temperature, "top_p": self.settings.top_p}
        try:
            with torch.inference_mode():
                made = self._network.generate(**inputs, max_new_tokens=self.settings.max_tokens, **sampling)
        except torch.OutOfMemoryError as error:
            raise ValueError(
                f"out of memory with batch_size = {self.settings.batch_size}: lower it, or image_side, or set load_4bit = true"
            ) from error
        made = made[:, inputs["input_ids"].shape[1] :]
        ends = self._network.generation_config.eos_token_id
        ends = set(ends) if isinstance(ends, list) else {ends}
        tokenizer = getattr(self._processor, "tokenizer", self._processor)
        said = tokenizer.batch_decode(made, skip_special_tokens=True)
        return [Answer(text=text, cut=not ends & set(row.tolist())) for text, row in zip(said, made, strict=True)]


def load_model(settings: BackendSettings) -> tuple[Any, Any]:
    """(model in eval mode, processor).

    Raises:
        ValueError: there is no such model, or it takes no images.
    """
    import torch
    from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

    options: dict[str, Any] = {"dtype": settings.dtype if settings.dtype == "auto" else getattr(torch, settings.dtype)}
    if settings.load_4bit:
        options["quantization_config"] = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)
    try:
        processor = load_processor(settings.model)
        network = AutoModelForImageTextToText.from_pretrained(
            settings.model, trust_remote_code=False, use_safetensors=True, device_map=settings.device_map, **options
        )
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:400]
        raise ValueError(
            f"model = {settings.model!r} cannot be loaded: {reason}; give a folder or hub id of a vision-language model"
        ) from error
    tokenizer = getattr(processor, "tokenizer", processor)
    tokenizer.padding_side = "left"  # generation goes on at the right
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return network.eval(), processor


def load_processor(path_or_id: str) -> Any:
    """The model's processor. Where torchvision is missing, only its video processor is: it is composed without that."""
    from transformers import AutoConfig, AutoImageProcessor, AutoProcessor, AutoTokenizer
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

    try:
        return AutoProcessor.from_pretrained(path_or_id, trust_remote_code=False)
    except ImportError as error:
        if "torchvision" not in str(error).lower():
            raise
        processor = PROCESSOR_MAPPING[type(AutoConfig.from_pretrained(path_or_id, trust_remote_code=False))]

        class WithoutVideo(processor):  # type: ignore[misc, valid-type]
            def check_argument_for_proper_class(self, name: str, value: Any) -> Any:
                return None if value is None else super().check_argument_for_proper_class(name, value)

        # The check compares class names, and images are all that is ever given.
        WithoutVideo.__name__ = processor.__name__
        tokenizer = AutoTokenizer.from_pretrained(path_or_id, trust_remote_code=False)
        return WithoutVideo(
            image_processor=AutoImageProcessor.from_pretrained(path_or_id, trust_remote_code=False, use_fast=False),
            tokenizer=tokenizer,
            video_processor=None,
            chat_template=tokenizer.chat_template,
        )


def _messages(chat: Chat) -> list[dict[str, Any]]:
    first = [{"type": "image"} for _ in chat.pictures] + [{"type": "text", "text": chat.turns[0]}]
    later = [
        {"role": ("user", "assistant")[index % 2], "content": [{"type": "text", "text": text}]}
        for index, text in enumerate(chat.turns[1:], start=1)
    ]
    return [{"role": "system", "content": [{"type": "text", "text": chat.system}]}, {"role": "user", "content": first}, *later]
