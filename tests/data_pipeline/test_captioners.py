"""Captioners: real transformers models with random weights, a user's own classes, and what becomes of bad rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from arlon_ray.artifact import ArtifactError
from data_pipeline import schema
from data_pipeline.captioners import Clip, ClipCaptioner, TransformersCaptioner, check_captioner, load_captioner
from data_pipeline.schema import DECODED, Row

TRANSFORMERS = "data_pipeline.captioners:TransformersCaptioner"
WORDS = ["a", "red", "blue", "circle", "square", "moves", "left", "on", "the", "picture", "of", "describe", "user"]
#: A chat template in the way of LLaVA's: the place of the picture, then the question.
TEMPLATE = (
    "{% for message in messages %}user {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endfor %} the"
)
#: A user's own captioners.
MODULE = '''
class Means:
    """The mean of each clip, spread over lines; `fail_on` makes a batch that holds that mean raise."""

    def __init__(self, fail_on: int = -1) -> None:
        self.fail_on, self.calls = fail_on, []

    def __call__(self, clips):
        self.calls.append([clip.shape for clip in clips])
        if any(int(clip.mean()) == self.fail_on for clip in clips):
            raise RuntimeError("cannot\\nsee this")
        return [f"  mean\\n {int(clip.mean())} " for clip in clips]


class Odd:
    """Answers wrongly for clips of the means 1, 2 and 3, each in its own way."""

    def __call__(self, clips):
        wrong = {1: " \\n", 2: None, 3: ["a list"]}
        return [wrong.get(int(clip.mean()), "good") for clip in clips]


class TooFew:
    """One caption, however many clips; none for a clip of mean 1."""

    def __call__(self, clips):
        return ["good"][: 1 - int(clips[0].mean() == 1)]


class OneText:
    def __call__(self, clips):
        return "x" * len(clips)


class Writes:
    def __call__(self, clips):
        clips[0][:] = 0
        return ["good"] * len(clips)


class Breaks:
    def __init__(self):
        raise OSError("no\\nmodel")

    def __call__(self, clips):
        return []


class Silent:
    pass


not_a_class = 3
'''


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of an importable module of a user."""
    (tmp_path / "my_captioners.py").write_text(MODULE)
    (tmp_path / "broken_captioners.py").write_text("import a_module_that_is_not_there\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    return "my_captioners"


def row(value: int, caption: str = "", shape: tuple[int, int, int] = (2, 4, 6), **changes: Any) -> Row:
    """A row of `DECODED` whose pixels all have this value."""
    frames, height, width = shape
    return {
        "clip_id": value,
        "source": "a.mp4",
        "uri": "/a.mp4",
        "start_s": 0.0,
        "end_s": 1.0,
        "fps": 16.0,
        "height": height,
        "width": width,
        "num_frames": frames,
        "given_frames": 0,
        "caption": caption,
        "source_height": height,
        "source_width": width,
        "source_duration_s": 1.0,
        "bucket": schema.bucket_name(frames, height, width),
        **dict.fromkeys(schema.SCORES.names),
        "frames": np.full((*shape, 3), value, np.uint8).tobytes(),
        "stage": "",
        "reason": "",
        "error": "",
        **changes,
    }


def captioned(captioner: ClipCaptioner, rows: list[Row]) -> list[Row]:
    """What becomes of rows; the table keeps its schema."""
    result = captioner(pa.Table.from_pylist(rows, schema=DECODED))
    assert result.schema == DECODED
    return result.to_pylist()


def test_rows_without_caption_get_one_and_the_others_stay(module: str) -> None:
    captioner = ClipCaptioner(f"{module}:Means", {}, batch_size=2)
    failed = row(4, reason=schema.DECODE_FAILED, stage="decode", error="why", frames=b"")
    rows = [row(1), row(2, "its own  caption"), row(3, shape=(5, 8, 2)), failed, row(5)]
    result = captioned(captioner, rows)
    assert [found["caption"] for found in result] == ["mean 1", "its own  caption", "mean 3", "", "mean 5"]
    assert result == [{**given, "caption": found["caption"]} for given, found in zip(rows, result, strict=True)]
    # two shapes in a batch, and never more than two clips
    assert captioner.captioner.calls == [[(2, 4, 6, 3), (5, 8, 2, 3)], [(2, 4, 6, 3)]]


def test_a_table_with_nothing_to_caption_comes_back_as_it_is(module: str) -> None:
    captioner = ClipCaptioner(f"{module}:Means", {}, batch_size=2)
    table = pa.Table.from_pylist([row(1, "a caption")], schema=DECODED)
    assert captioner(table).equals(table)
    assert captioned(captioner, []) == []
    assert captioner.captioner.calls == []


def test_a_batch_that_raises_costs_only_the_bad_clip(module: str) -> None:
    captioner = ClipCaptioner(f"{module}:Means", {"fail_on": 2}, batch_size=4)
    result = captioned(captioner, [row(1), row(2), row(3), row(4, frames=b"too few bytes")])
    assert [found["caption"] for found in result] == ["mean 1", "", "mean 3", ""]
    assert [(found["stage"], found["reason"]) for found in result] == [
        ("", ""),
        ("caption", schema.CAPTION_FAILED),
        ("", ""),
        ("caption", schema.CAPTION_FAILED),
    ]
    assert result[1]["error"] == "RuntimeError: cannot see this" and "ValueError" in result[3]["error"]
    assert result[1]["frames"] == result[3]["frames"] == b"" and result[0]["frames"] == row(1)["frames"]


def test_answers_that_are_no_captions_are_rejected(module: str) -> None:
    result = captioned(ClipCaptioner(f"{module}:Odd", {}), [row(value) for value in range(5)])
    assert [found["caption"] for found in result] == ["good", "", "", "", "good"]
    assert [found["reason"] for found in result] == ["", *[schema.CAPTION_FAILED] * 3, ""]
    errors = [found["error"] for found in result[1:4]]
    assert "is empty" in errors[0] and "NoneType, expected text" in errors[1] and "list, expected text" in errors[2]
    assert all(found["frames"] == b"" for found in result[1:4])


def test_a_wrong_number_of_answers_is_asked_again_one_by_one(module: str) -> None:
    result = captioned(ClipCaptioner(f"{module}:TooFew", {}), [row(0), row(1), row(2)])
    assert [found["caption"] for found in result] == ["good", "", "good"]
    assert result[1]["reason"] == schema.CAPTION_FAILED and "0 captions for 1 clips" in result[1]["error"]


def test_one_text_is_not_taken_for_a_list_of_letters(module: str) -> None:
    result = captioned(ClipCaptioner(f"{module}:OneText", {}), [row(0), row(1)])
    assert [found["reason"] for found in result] == [schema.CAPTION_FAILED] * 2
    assert "returned str" in result[0]["error"]


def test_a_captioner_cannot_change_the_frames(module: str) -> None:
    (result,) = captioned(ClipCaptioner(f"{module}:Writes", {}), [row(7)])
    assert result["reason"] == schema.CAPTION_FAILED and "read-only" in result["error"]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("Means", "expected package.module:Class"),
        ("my_captioners.Means", "expected package.module:Class"),
        ("my_captioners:", "expected package.module:Class"),
        (":Means", "expected package.module:Class"),
        ("my captioners:Means", "expected package.module:Class"),
        ("no_such_captioners:Means", "ModuleNotFoundError: No module named 'no_such_captioners'"),
        ("broken_captioners:Means", "cannot be imported.*a_module_that_is_not_there"),
        ("my_captioners:Median", "my_captioners has no Median"),
        ("my_captioners:not_a_class", "expected a class"),
        ("my_captioners:Silent", "__call__"),
    ],
)
def test_a_path_that_names_no_captioner_is_refused(module: str, path: str, message: str) -> None:
    for look in (lambda path: check_captioner(path, {}), lambda path: load_captioner(path, {})):
        with pytest.raises(ArtifactError, match=message) as caught:
            look(path)
        assert path in str(caught.value) and "\n" not in str(caught.value)


def test_a_class_is_found_without_being_made(module: str) -> None:
    check_captioner(f"{module}:Breaks", {})
    with pytest.raises(ArtifactError, match=r"my_captioners:Breaks cannot be made: OSError: no model"):
        load_captioner(f"{module}:Breaks", {})


def test_options_that_the_class_does_not_take_are_refused(module: str) -> None:
    with pytest.raises(ArtifactError, match=r"unexpected keyword argument 'fail' \(it takes: fail_on\)"):
        load_captioner(f"{module}:Means", {"fail": 1})
    with pytest.raises(ArtifactError, match="missing a required argument: 'model'"):
        load_captioner(TRANSFORMERS, {})


def _tokenizer(folder: Path, **special: Any) -> Any:
    from transformers import BertTokenizer

    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    tokenizer = BertTokenizer(str(folder / "vocab.txt"))
    tokenizer.add_special_tokens(special)
    return tokenizer


def _sharpen(model: torch.nn.Module) -> None:
    """Random weights so large that what the model says depends on the picture."""
    torch.manual_seed(3)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)


@pytest.fixture(scope="module")
def blip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a very small BLIP, its tokenizer and its image processor."""
    from transformers import BlipConfig, BlipForConditionalGeneration, BlipImageProcessorPil, BlipProcessor

    folder = tmp_path_factory.mktemp("blip")
    tokenizer = _tokenizer(folder, bos_token="[DEC]")
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"bos_token_id": tokenizer.bos_token_id, "sep_token_id": 3, "eos_token_id": 3, "pad_token_id": 0}
    text = {**size, **ids, "encoder_hidden_size": 32, "vocab_size": len(tokenizer), "max_position_embeddings": 64}
    model = BlipForConditionalGeneration(
        BlipConfig(text_config=text, vision_config={**size, "image_size": 32, "patch_size": 8})
    )
    _sharpen(model)
    model.save_pretrained(folder)
    BlipProcessor(BlipImageProcessorPil(size={"height": 32, "width": 32}), tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a very small LLaVA: a decoder-only chat model."""
    from transformers import (
        CLIPImageProcessorPil,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    folder = tmp_path_factory.mktemp("llava")
    tokenizer = _tokenizer(folder, additional_special_tokens=["<image>"])
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**size, image_size=32, patch_size=8),
        text_config=LlamaConfig(
            **size, vocab_size=len(tokenizer), bos_token_id=2, eos_token_id=3, pad_token_id=0, tie_word_embeddings=False
        ),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=16,
    )
    model = LlavaForConditionalGeneration(config)
    _sharpen(model)
    model.save_pretrained(folder)
    images = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    LlavaProcessor(
        images,
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    ).save_pretrained(folder)
    return folder


def clips() -> list[Clip]:
    """Clips of two shapes, of which every frame is another picture."""
    noise = np.random.default_rng(0).integers(0, 255, (5, 24, 40, 3), dtype=np.uint8)
    blue = np.zeros((4, 32, 16, 3), np.uint8)
    blue[..., 2] = np.array([0, 90, 180, 255], np.uint8)[:, None, None]
    return [noise, blue]


def expected(folder: Path, clip: Clip, prompt: str | None = None) -> str:
    """What the model's own `generate` says of the middle frame."""
    from transformers import AutoProcessor, BlipForConditionalGeneration

    model = BlipForConditionalGeneration.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder)
    inputs = processor(images=Image.fromarray(clip[len(clip) // 2]), text=prompt, return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    return processor.decode(tokens[0], skip_special_tokens=True)


@pytest.mark.parametrize("prompt", [None, "a picture of"])
def test_blip_says_of_a_clip_what_it_says_of_its_middle_frame(blip: Path, prompt: str | None) -> None:
    captioner = load_captioner(TRANSFORMERS, {"model": str(blip), "max_new_tokens": 12, "prompt": prompt})
    captions = list(captioner(clips()))
    assert captions == [expected(blip, clip, prompt) for clip in clips()]
    assert all(isinstance(caption, str) and set(caption.split()) <= set(WORDS) for caption in captions)
    assert captions[0] != captions[1] and all(captions)
    assert all(caption.startswith(prompt or "") for caption in captions)
    # the same again, and alone as in company
    assert captions == list(captioner(clips())) == [next(iter(captioner([clip]))) for clip in clips()]


def test_blip_looks_at_the_middle_frame_only(blip: Path) -> None:
    captioner = load_captioner(TRANSFORMERS, {"model": str(blip), "device": "cpu", "max_new_tokens": 12})
    noise, blue = clips()
    mixed = np.concatenate([noise[:2], np.broadcast_to(blue[2, :24, :1], noise[2:3].shape), noise[3:]])
    assert captioner([mixed[2:3], noise[2:3]]) == captioner([mixed, noise])
    assert captioner([mixed]) != captioner([noise])


def test_blip_captions_a_table(blip: Path) -> None:
    rows = [
        row(number, shape=clip.shape[:3], frames=clip.tobytes())  # type: ignore[arg-type]
        for number, clip in enumerate(clips())
    ]
    captioner = ClipCaptioner(TRANSFORMERS, {"model": str(blip), "max_new_tokens": 12}, batch_size=2)
    result = captioned(captioner, [*rows, row(9, "its own")])
    assert [found["caption"] for found in result] == [*(expected(blip, clip) for clip in clips()), "its own"]


def test_frames_described_together_are_described_as_alone(
    blip: Path, llava: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in (blip, llava):
        captioner = load_captioner(TRANSFORMERS, {"model": str(folder), "max_new_tokens": 6, "prompt": "describe"})
        assert isinstance(captioner, TransformersCaptioner)
        alone = captioner(clips())
        # as on a GPU
        monkeypatch.setattr(captioner, "_together", lambda frames: [frames])
        assert captioner(clips()) == alone


def test_a_chat_model_is_asked_the_prompt_and_does_not_repeat_it(llava: Path) -> None:
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    captioner = load_captioner(TRANSFORMERS, {"model": str(llava), "max_new_tokens": 6, "prompt": "describe"})
    model, processor = LlavaForConditionalGeneration.from_pretrained(llava), AutoProcessor.from_pretrained(llava)
    texts = []
    for clip in clips():
        frame = Image.fromarray(clip[len(clip) // 2])
        inputs = processor(images=frame, text="user <image> describe the", return_tensors="pt")
        tokens = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        texts.append(processor.decode(tokens, skip_special_tokens=True))
    assert captioner(clips()) == texts
    assert texts[0] != texts[1]


def _without_weights(blip: Path, folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(blip / "model.safetensors")
    weights.pop("vision_model.post_layernorm.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _cut_short(blip: Path, folder: Path) -> None:
    (folder / "model.safetensors").write_bytes((blip / "model.safetensors").read_bytes()[:1000])


def _no_image_processor(blip: Path, folder: Path) -> None:
    (folder / "processor_config.json").unlink()


def _text_model(blip: Path, folder: Path) -> None:
    from transformers import BertConfig

    BertConfig().save_pretrained(folder)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_without_weights, "1 weights are missing, vision_model.post_layernorm.weight"),
        (_cut_short, "cannot be loaded"),
        (_no_image_processor, "processor"),
        (_text_model, "a bert model, expected one that turns images into text"),
    ],
)
def test_a_folder_that_cannot_caption_is_named(
    blip: Path, tmp_path: Path, spoil: Callable[[Path, Path], None], message: str
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for file in blip.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    spoil(blip, folder)
    with pytest.raises(ArtifactError, match=message) as caught:
        load_captioner(TRANSFORMERS, {"model": str(folder)})
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["/no/such/folder", "./nowhere", "a/folder/deep", "blip", ""])
def test_a_model_that_is_neither_folder_nor_hub_name_is_refused(name: str) -> None:
    with pytest.raises(ArtifactError, match="no such folder; expected a folder or a hub name"):
        load_captioner(TRANSFORMERS, {"model": name})


@pytest.mark.parametrize(
    ("options", "message"),
    [({"device": "tpu"}, "device=tpu: expected auto, cpu or cuda"), ({"max_new_tokens": 0}, "expected at least 1")],
)
def test_other_options_are_checked(blip: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        load_captioner(TRANSFORMERS, {"model": str(blip), **options})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_named(blip: Path) -> None:
    with pytest.raises(ArtifactError, match="device=cuda, but torch finds no GPU"):
        load_captioner(TRANSFORMERS, {"model": str(blip), "device": "cuda"})
