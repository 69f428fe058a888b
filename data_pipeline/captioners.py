"""Captions for clips that come without one: a class named by import path, and one over transformers' image models.

A captioner is any class whose instances are called with a list of clips and return one caption for each. The setting
`data.captioner` names it ("package.module:Class"), `data.captioner_options` are its keyword arguments.

Legend: T frames, H × W pixels of a clip, S clips in a call (their shapes may differ), L tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from arlon_ray.artifact import ArtifactError, one_line
from data_pipeline import schema
from data_pipeline.batches import in_batches
from data_pipeline.schema import DECODED, STAGE_CAPTION, Row

Clip = NDArray[np.uint8]


class Captioner(Protocol):
    """What is asked of a captioner. It may raise: then the clips are tried again one by one."""

    def __call__(self, clips: list[Clip]) -> Sequence[str]:
        """One caption for each of S clips, uint8 RGB [T,H,W,3] (not to be written to), in their order."""
        ...


def check_captioner(path: str, options: Mapping[str, Any]) -> None:
    """Import the class "package.module:Class" without making one. Raises ArtifactError as `load_captioner` does."""
    _fitting(path, options)


def load_captioner(path: str, options: Mapping[str, Any]) -> Captioner:
    """The captioner `path` ("package.module:Class"), made with `options` as keyword arguments.

    Raises ArtifactError if the path is malformed, if the module cannot be imported or has no such class, if the class
    does not take the options, or if it fails.
    """
    try:
        return _fitting(path, options)(**options)
    except ArtifactError:
        raise
    except Exception as error:  # anything: the class is the user's
        raise ArtifactError(
            f"data.captioner={path} cannot be made: {type(error).__name__}: {one_line(error)}"
        ) from None


def _fitting(path: str, options: Mapping[str, Any]) -> Any:
    """The class, which takes these options."""
    kind = _find(path)
    try:
        inspect.signature(kind).bind(**options)
    except TypeError as error:
        taken = ", ".join(inspect.signature(kind).parameters) or "none"
        raise ArtifactError(
            f"data.captioner_options do not fit {path}: {one_line(error)} (it takes: {taken})"
        ) from None
    return kind


def _find(path: str) -> Any:
    """The class itself."""
    module, _, name = path.partition(":")
    if not name.isidentifier() or not all(part.isidentifier() for part in module.split(".")):
        raise ArtifactError(f"data.captioner={path}: expected package.module:Class")
    try:
        found = getattr(import_module(module), name, None)
    except Exception as error:  # anything: importing runs the user's code
        raise ArtifactError(
            f"data.captioner={path}: module {module} cannot be imported: {type(error).__name__}: {one_line(error)}"
        ) from None
    if found is None:
        raise ArtifactError(f"data.captioner={path}: module {module} has no {name}")
    if not isinstance(found, type) or not any("__call__" in vars(base) for base in found.__mro__):
        raise ArtifactError(f"data.captioner={path}: expected a class with a method __call__(clips)")
    return found


class ClipCaptioner:
    """Captions tables of `schema.DECODED`: the rows that have neither a caption nor a reason. One lives in an actor."""

    def __init__(self, path: str, options: Mapping[str, Any], batch_size: int = 16) -> None:
        """`batch_size`: the most clips that the captioner is given at once. Raises ArtifactError (`load_captioner`)."""
        self.captioner, self.batch_size = load_captioner(path, options), batch_size

    def __call__(self, table: pa.Table) -> pa.Table:
        """Every row in comes out once, in the same order: captioned, rejected, or as it was."""
        rows: list[Row] = table.to_pylist()
        wanting = [position for position, row in enumerate(rows) if not row["caption"].strip() and not row["reason"]]
        if not wanting:
            return table
        captioned = in_batches([rows[p] for p in wanting], self.batch_size, self._caption, _rejected)
        for position, result in zip(wanting, captioned, strict=True):
            rows[position] = result
        return pa.Table.from_pylist(rows, schema=DECODED)

    def _caption(self, rows: list[Row]) -> list[Row]:
        return list(map(_captioned, rows, self._ask(rows)))

    def _ask(self, rows: list[Row]) -> list[object]:
        """As many answers as rows; whether they are captions is not looked at."""
        answers: object = self.captioner([_clip(row) for row in rows])
        if isinstance(answers, str | bytes | Mapping) or not isinstance(answers, Iterable):
            raise TypeError(f"the captioner returned {type(answers).__name__}, expected a list of captions")
        captions = list(answers)
        if len(captions) != len(rows):
            raise ValueError(f"the captioner returned {len(captions)} captions for {len(rows)} clips")
        return captions


def _clip(row: Row) -> Clip:
    """The frames [T,H,W,3] of a row."""
    return np.frombuffer(row["frames"], np.uint8).reshape(row["num_frames"], row["height"], row["width"], 3)


def _captioned(row: Row, caption: object) -> Row:
    """The row with its caption on one line; rejected if that is not text, or says nothing."""
    if not isinstance(caption, str):
        return _rejected(row, f"the caption is {type(caption).__name__}, expected text")
    words = " ".join(caption.split())
    return {**row, "caption": words} if words else _rejected(row, "the caption is empty")


def _rejected(row: Row, error: str) -> Row:
    failed = {"stage": STAGE_CAPTION, "reason": schema.CAPTION_FAILED, "error": schema.one_line(error)}
    return {**row, "frames": b"", **failed}


#: What a chat model is asked where no prompt is given.
QUESTION = "Describe this picture in one sentence."


class TransformersCaptioner:
    """Captions a clip's middle frame with an image-to-text model of transformers (BLIP, GIT, LLaVA, SmolVLM, …)."""

    def __init__(
        self, model: str, *, device: str = "auto", max_new_tokens: int = 40, prompt: str | None = None
    ) -> None:
        """`model`: a folder (absolute: a Ray actor has its own working directory) or a hub name.

        `device`: "cpu", "cuda", or "auto" (a GPU if there is one). `prompt`: the first words of the caption for models
        such as BLIP; the question for chat models (default: `QUESTION`). Raises ArtifactError if there is no such
        model, or if it is not one that captions images; ValueError for the other arguments.
        """
        if device not in ("auto", "cpu", "cuda"):
            raise ValueError(f"device={device}: expected auto, cpu or cuda")
        if device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device=cuda, but torch finds no GPU here (data.captioner_gpus gives the captioner one)")
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={max_new_tokens}: expected at least 1")
        self.device = "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
        self.max_new_tokens, self.prompt = max_new_tokens, prompt
        self.processor, self.model = _load_image_to_text(model, self.device)

    def __call__(self, clips: list[Clip]) -> list[str]:
        """One caption for each clip, uint8 [T,H,W,3]; greedy decoding: equal frames, equal captions."""
        from PIL import Image

        frames = [Image.fromarray(clip[len(clip) // 2]) for clip in clips]
        return [caption for batch in self._together(frames) for caption in self._describe(batch)]

    def _together(self, frames: list[Any]) -> Iterator[list[Any]]:
        """Frames to describe at once: on a CPU each alone, so that its caption does not hang on its neighbours.

        Kernels round differently for other batch sizes, and greedy decoding may then take another word.
        """
        if self.device == "cpu":
            yield from ([frame] for frame in frames)
        else:
            yield frames

    @torch.inference_mode()
    def _describe(self, frames: list[Any]) -> list[str]:
        """Captions of pictures (PIL)."""
        inputs = self._inputs(frames).to(self.device, dtype=self.model.dtype)
        prompts = inputs.get("input_ids")
        tokens = self.model.generate(**inputs, max_new_tokens=self.max_new_tokens, do_sample=False, num_beams=1)
        if prompts is not None and torch.equal(tokens[:, : prompts.shape[1]], prompts):
            # a decoder-only model repeats what it was asked before it answers
            tokens = tokens[:, prompts.shape[1] :]
        return self.processor.batch_decode(tokens, skip_special_tokens=True)

    def _inputs(self, frames: list[Any]) -> Any:
        """Pixels, and the tokens [S,L] of the prompt, as the model takes them."""
        if not getattr(self.processor, "chat_template", None):
            text = None if self.prompt is None else [self.prompt] * len(frames)
            return self.processor(images=frames, text=text, return_tensors="pt", padding=True)
        question = {"type": "text", "text": self.prompt or QUESTION}
        return self.processor.apply_chat_template(
            [[{"role": "user", "content": [{"type": "image", "image": frame}, question]}] for frame in frames],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
        )


def _load_image_to_text(source: str, device: str) -> tuple[Any, Any]:
    """(processor, model) of a folder or hub name. Raises ArtifactError."""
    from transformers.utils import logging

    # before the rest is imported: it would say of each image processor that torchvision is not there
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    from transformers import (
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        AutoConfig,
        AutoModelForImageTextToText,
        AutoProcessor,
    )

    place, what = _place(source), f"captioner model {source}"
    dtype = torch.float32 if device == "cpu" else "auto"
    try:
        config = AutoConfig.from_pretrained(**place)
        if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
            raise ArtifactError(f"{what}: a {config.model_type} model, expected one that turns images into text")
        processor = AutoProcessor.from_pretrained(**place)
        loaded: Any = AutoModelForImageTextToText.from_pretrained(**place, dtype=dtype, output_loading_info=True)
        model, info = loaded
    except ArtifactError:
        raise
    except Exception as error:  # what it raises depends on the file that is missing or damaged, or on the network
        raise ArtifactError(f"{what}: cannot be loaded: {one_line(error)}") from None
    if missing := sorted(info["missing_keys"]):
        # transformers would fill them with random numbers
        raise ArtifactError(f"{what}: {len(missing)} weights are missing, {missing[0]} for one")
    if not hasattr(processor, "image_processor") or not hasattr(processor, "tokenizer"):
        raise ArtifactError(f"{what}: its processor is no pair of an image processor and a tokenizer")
    processor.tokenizer.padding_side = "left"  # answers begin where the prompts end
    return processor, model.to(device).eval()


def _place(source: str) -> dict[str, Any]:
    """Arguments of `from_pretrained` for a folder or a hub name. Raises ArtifactError if it can be neither."""
    folder = Path(source).expanduser()
    if source.strip() and folder.is_dir():
        return {"pretrained_model_name_or_path": str(folder.absolute()), "local_files_only": True}
    if source.startswith((".", "/", "~")) or source.count("/") != 1:
        raise ArtifactError(f"captioner model {source}: no such folder; expected a folder or a hub name (owner/name)")
    return {"pretrained_model_name_or_path": source}
