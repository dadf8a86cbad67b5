"""Settings of the tools, declared once: a TOML file (`--config`) and command-line options are both read into them."""

from __future__ import annotations

import argparse
import difflib
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

from pydantic import Field, ValidationError, field_validator, model_validator

from byg_plugin import _cli
from byg_plugin.config.fields import NonNegative, Section, Seed
from byg_plugin.documents import json_value, toml_table

_SHOWN = 200  # characters of a wrong value
SECTIONS = ("generate", "captions", "render", "judge")
EDIT_MODEL = "Qwen/Qwen3-VL-30B-A3B-Thinking"
TEXT_MODEL = "Qwen/Qwen3-VL-30B-A3B-Instruct"
JUDGE_MODEL = "Qwen/Qwen2.5-VL-72B-Instruct"
Seconds = Annotated[float, Field(gt=0.0, le=7 * 86400.0)]
# More than anybody has: one more zero than was meant is said at once, not after hours or by a machine without memory.
Count = Annotated[int, Field(gt=0, le=10_000)]
Tokens = Annotated[int, Field(gt=0, le=10_000_000)]
Side = Annotated[int, Field(gt=0, le=16_384)]


def _of_home(path: str | None) -> str | None:
    """A path with the user's own folder for `~`, which a shell leaves as it is in `--out=~/x` and nobody else expands."""
    return None if path is None else os.path.expanduser(path)


class BackendSettings(Section):
    """Which model answers, and how it is asked."""

    backend: Literal["openai", "transformers", "rules"] = Field(
        "openai", description="openai = any OpenAI-compatible server; transformers = in this process; rules = no model, from captions."
    )
    model: str = Field(EDIT_MODEL, min_length=1, description="Model as the server calls it, or hub id or folder for transformers.")
    base_url: str | None = Field(
        None, min_length=1, description="Server's address up to /v1; default: $OPENAI_BASE_URL, then http://127.0.0.1:8000/v1 (vLLM's own)."
    )
    key_env: str = Field("OPENAI_API_KEY", min_length=1, description="Environment variable that holds the server's key; it may be unset.")
    in_flight: Count = Field(32, description="Requests at once.")
    timeout: Seconds = Field(600.0, description="Seconds an answer may take, thinking included.")
    retry_for: Seconds = Field(900.0, description="Seconds that a request is tried again on 429, 5xx, timeouts and cut connections.")
    stream: bool = Field(False, description="Ask for streamed answers: gateways that cut silent connections keep them open.")
    extra_body: dict[str, Any] = Field(
        default_factory=dict,
        description='More fields of each request, e.g. {"chat_template_kwargs": {"enable_thinking": false}}; null removes one.',
    )
    temperature: Annotated[float, Field(ge=0.0)] = Field(1.0, description="Sampling temperature; 0 = greedy.")
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = Field(0.95, description="Nucleus sampling.")
    max_tokens: Tokens = Field(8192, description="Tokens an answer may have, thinking included.")
    image_side: Annotated[int, Field(ge=64, le=16_384)] = Field(
        1024, description="Larger images are sent scaled down to this longest side, in pixels."
    )
    batch_size: Count = Field(4, description="transformers: requests generated at once.")
    device_map: str = Field("auto", min_length=1, description="transformers: where the weights go: auto, cuda:0, cpu.")
    load_4bit: bool = Field(False, description="transformers: weights in 4 bits (bitsandbytes extra, CUDA).")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field("auto", description="transformers: dtype of the weights.")
    seed: Seed = Field(0, description="Seed of every draw; the server gets one made of it and the input's name.")
    limit: NonNegative = Field(0, description="Stop after so many new inputs; 0 = all.")
    shard: str = Field("1/1", description="i/n: this machine's part of the inputs; each part has output files of its own.")
    retry: Literal["", "all", "server", "rules", "parse", "input"] = Field(
        "", description="First take rejects of this kind back from the rejects file and try them again."
    )

    _home = field_validator("model")(_of_home)

    @field_validator("shard")
    @classmethod
    def _check_shard(cls, text: str) -> str:
        match = re.fullmatch(r"([1-9][0-9]{0,5})/([1-9][0-9]{0,5})", text)
        if not match or int(match[1]) > int(match[2]):
            raise ValueError(f"shard = {_brief(text)}: i/n with i from 1 to n, e.g. 1/4")
        return text

    @property
    def shard_and_count(self) -> tuple[int, int]:
        """(number of this shard from 0, how many there are)."""
        number, of = self.shard.split("/")
        return int(number) - 1, int(of)


class GenerateSettings(BackendSettings):
    """Images to edit tuples."""

    images: str = Field(
        min_length=1, description="Folder of images (searched whole; same-stem .txt = caption), or a .jsonl, .csv or .parquet table."
    )
    out: str = Field(min_length=1, description="JSONL of tuples; rejects, summary and plot lie beside it.")
    image_root: str | None = Field(None, min_length=1, description="What relative paths of a table start from; default: its folder.")
    image_column: str = Field("image", min_length=1, description="Table: column of the image's path.")
    caption_column: str = Field("caption", description="Table: column of the caption; may be missing.")
    style_column: str = Field("style", description="Table: column that says how an image is made (photo, anime, ...); may be missing.")
    style: str | None = Field(None, description="How images are made that say nothing of it themselves.")
    k: Annotated[int, Field(ge=1, le=10)] = Field(3, description="Edit types offered an image; the model takes one.")
    style_conversion: Annotated[float, Field(ge=0.0, le=1.0)] = Field(
        0.15, description="Chance that an image known to be no photograph is turned into one."
    )

    _places = field_validator("images", "out", "image_root")(_of_home)


class CaptionsSettings(BackendSettings):
    """Captions of a table to prompts for video, or clips to tuples."""

    model: str = Field(TEXT_MODEL, min_length=1, description="Model that cleans captions (text alone) or describes clips.")
    table: str | None = Field(None, min_length=1, description="Table of captions (.csv, .parquet, .jsonl), e.g. VideoUFO's.")
    clips: str | None = Field(
        None, min_length=1, description="Instead: a folder of clips that exist already; the model describes their frames."
    )
    out: str = Field(min_length=1, description="JSONL of prompts, or, with clips, of tuples.")
    caption_column: str = Field("Detailed Caption", description="Column of the caption (case and _ do not matter).")
    id_column: str = Field("ID", description="Column that names a row; rows without it are named by their number.")
    count: NonNegative = Field(400, description="Rows drawn from the table at random; 0 = all.")
    frames: Annotated[int, Field(ge=1, le=64)] = Field(6, description="Clips: frames shown to the model.")
    hold_out: NonNegative = Field(4, description="Clips: clips a style marked for validation.")

    _places = field_validator("table", "clips", "out")(_of_home)

    @model_validator(mode="after")
    def _check(self) -> CaptionsSettings:
        if (self.table is None) == (self.clips is None):
            raise ValueError("give table = FILE (captions to render) or clips = FOLDER (clips that exist), one of the two")
        if self.backend == "rules":
            raise ValueError("backend = 'rules' cannot clean captions: use openai or transformers")
        return self


class RenderSettings(Section):
    """Prompts to clips with a Wan text-to-video pipeline."""

    captions: str = Field(min_length=1, description="JSONL of prompts, as prepare_captions.py writes it.")
    out: str = Field(min_length=1, description="Folder of the clips; tuples.jsonl is written into it.")
    model: str = Field(
        "Wan-AI/Wan2.2-T2V-A14B-Diffusers", min_length=1, description="Diffusers folder or hub id of a Wan text-to-video pipeline."
    )
    width: Side = Field(832, description="Pixels.")
    height: Side = Field(480, description="Pixels.")
    frames: Count = Field(81, description="Frames a clip, 4n + 1.")
    fps: Annotated[float, Field(gt=0.0, le=1000.0)] = Field(16.0, description="Frames a second of the files (Wan: 16, the 5B 24).")
    steps: Count = Field(40, description="Sampling steps.")
    guidance: Annotated[float, Field(ge=1.0)] = Field(4.0, description="Classifier-free guidance (of the high-noise expert).")
    guidance_2: Annotated[float, Field(ge=1.0)] | None = Field(3.0, description="The same of the low-noise expert; ignored without one.")
    negative: str | None = Field(None, description="Text that guidance leads away from; default: Wan's own.")
    dtype: Literal["bfloat16", "float16", "float32"] = Field("bfloat16", description="Dtype of transformers and text encoder.")
    offload: bool = Field(False, description="Keep parts that are not in use in main memory.")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto = CUDA where there is one, else CPU.")
    seed: Seed = Field(0, description="Seed; each prompt's own is made of it and the prompt's id.")
    hold_out: NonNegative = Field(4, description="Clips a style marked for validation (paper: 4).")
    tuples_only: bool = Field(False, description="Render nothing; write tuples.jsonl of the clips that are there.")

    _home = field_validator("captions", "out", "model")(_of_home)

    @model_validator(mode="after")
    def _check(self) -> RenderSettings:
        if (self.frames - 1) % 4:
            raise ValueError(f"frames = {self.frames}: Wan makes 4n + 1 frames, e.g. {max(1, (self.frames - 1) // 4 * 4 + 1)}")
        for name in ("width", "height"):
            if getattr(self, name) % 16:
                raise ValueError(f"{name} = {getattr(self, name)}: must be a multiple of 16")
        return self


class JudgeSettings(BackendSettings):
    """Edits to a model's scores of them."""

    edits: str | None = Field(None, min_length=1, description="Folder of edit.py's results, or its edits.jsonl.")
    tuples: str | None = Field(None, min_length=1, description="JSONL of tuples; with results, whose files are named by their ids.")
    results: str | None = Field(None, min_length=1, description="Folder of edits of another tool.")
    out: str = Field(min_length=1, description="JSONL of scores, for evaluate.py --judged; answers that cannot be read lie beside it.")
    ask: Literal["viescore", "imgedit"] = Field(
        "viescore", description="viescore = two questions of two scores, 0 to 10; imgedit = one question of three, 1 to 5."
    )
    prompts: str | None = Field(None, min_length=1, description="TOML or JSON of other words for the questions; docs/evaluation.md.")
    frames: Annotated[int, Field(ge=2, le=32)] = Field(4, description="Clips: frames of source and of edit, each, that the judge sees.")
    price_in: Annotated[float, Field(ge=0.0)] | None = Field(None, description="What a million tokens sent cost, for the sum shown.")
    price_out: Annotated[float, Field(ge=0.0)] | None = Field(None, description="What a million tokens answered cost.")
    model: str = Field(JUDGE_MODEL, min_length=1, description="Model as the server calls it, or hub id or folder for transformers.")
    temperature: Annotated[float, Field(ge=0.0)] = Field(0.0, description="Sampling temperature; 0 = greedy.")
    max_tokens: Tokens = Field(1024, description="Tokens an answer may have, thinking included.")

    _places = field_validator("edits", "tuples", "results", "out", "prompts")(_of_home)

    @model_validator(mode="after")
    def _check(self) -> JudgeSettings:
        if self.backend == "rules":
            raise ValueError("backend = 'rules' cannot judge: use openai or transformers")
        if (self.price_in is None) != (self.price_out is None):
            raise ValueError("give price_in and price_out, both or none")
        return self


S = TypeVar("S", bound=Section)


def read_settings(model: type[S], section: str, description: str, arguments: Sequence[str] | None = None) -> S:
    """Settings from `--config FILE` (its `[section]`) and options, which win.

    Raises:
        ValueError: a key is unknown, missing or wrong; it names key, value and remedy.
    """
    parser = argparse.ArgumentParser(
        prog=Path(sys.argv[0]).name, description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", type=_cli.given_path, metavar="FILE", help=f"TOML file whose [{section}] has the same keys")
    for name, option in model.model_fields.items():
        default = "required" if option.is_required() else f"default: {_shown(option.get_default(call_default_factory=True))}"
        text = f"{option.description} ({default})".replace("%", "%%")
        flag = _cli.option(name)
        if option.annotation is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=text)
        else:
            parser.add_argument(flag, metavar="VALUE", help=text)
    given = vars(parser.parse_args(arguments))
    config = given.pop("config")
    raw = _section(config, section) if config else {}
    raw |= {name: _value(model, name, text) for name, text in given.items() if text is not None}
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        where = f"{config} [{section}] and options" if config else "options"
        lines = [f"  - {_explain(model, item)}" for item in error.errors(include_url=False)]
        raise ValueError(f"{where}:\n" + "\n".join(lines)) from error


def _section(path: Path, section: str) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"--config {path}: no such file")
    try:
        raw = toml_table(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"--config {path}: not valid TOML: {error}") from error
    if unknown := [name for name in raw if name not in SECTIONS]:
        raise ValueError(f"--config {path}: unknown section or key {_brief(unknown[0])}; sections are {', '.join(SECTIONS)}")
    table = raw.get(section, {})
    if not isinstance(table, dict):
        raise ValueError(f"--config {path}: {section} = {_brief(table)} is no section; write [{section}]")
    return dict(table)


def _brief(value: Any) -> str:
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # a number of more digits than Python writes, nesting of more levels
        return f"({type(value).__name__})"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _shown(value: Any) -> str:
    return "none" if value is None or value == "" else str(value)


def _value(model: type[Section], name: str, text: Any) -> Any:
    """An option's text as the type its field has; what does not parse stays text, and validation refuses it."""
    annotation = model.model_fields[name].annotation
    kinds = {annotation, get_origin(annotation), *get_args(annotation)}
    if not isinstance(text, str) or (kinds & {str, Literal} and dict not in kinds):
        return text
    try:
        return json_value(text)
    except ValueError:
        return text


def _explain(model: type[Section], item: Any) -> str:
    location = ".".join(map(str, item["loc"]))
    if item["type"] == "extra_forbidden":
        close = difflib.get_close_matches(location, model.model_fields, n=1)
        return f"unknown key {location} = {_brief(item['input'])}" + (f"; did you mean {close[0]}?" if close else "")
    described = model.model_fields[location].description if location in model.model_fields else ""
    if item["type"] == "missing":
        return f"{location} is missing: {described}"
    message = item["msg"].removeprefix("Value error, ")
    return message if item["type"] == "value_error" else f"{location} = {_brief(item['input'])}: {message} ({described})"
