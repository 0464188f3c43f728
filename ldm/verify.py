"""Reference outputs, rerun on somebody's own weights: `ldm verify MODEL`.

verify.json beside this file has them in groups, one for each set of weights that outputs were recorded on. A group's
"model" is what `ldm.inspect` must say of a model for it to apply; files of SD 1.1, 1.4 and 1.5 look the same, so that
several may. A row is one case: the kind of run (a function below), its inputs, the index `at` into its output
(B,C,h,w) in which [a, b] is the slice a:b, the values expected there, and how far off they may be.

An input is the address of a file, looked for by its last part, or {"seed", "shape"}: NumPy's RandomState.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldm.inspection import inspect
from ldm.pipeline import DEFAULT_MODEL, Pipeline
from ldm.samplers import ALIASES, SAMPLERS
from ldm.settings import Settings

REFERENCES = Path(__file__).with_suffix(".json")
WIDTHS = 36, 17, 18, 25, 25, 10, 9, 0
HEADER = ("case", "weights", "sampler", "expected", "got", "difference", "tolerance", "result")

Row = Mapping[str, Any]
Given = str | Mapping[str, Any]  # an input: the address of a file, or how to draw it


class NotRun(Exception):
    """Says why a row cannot be run here."""


@dataclass(frozen=True)
class Result:
    """What became of a row. `print(result)` shows it as a line under HEADER.

    difference: the largest one of all values, or the cosine distance where the reference measures that. why: what kept
    the row from being run, or what stopped it.
    """

    case: str
    weights: str
    sampler: str
    expected: tuple[float, ...]
    tolerance: float
    got: tuple[float, ...] = ()
    difference: float | None = None
    why: str = ""

    @property
    def passed(self) -> bool | None:
        """None for a row that was not run."""
        return None if self.difference is None else self.difference <= self.tolerance

    def __str__(self) -> str:
        verdict = {True: "pass", False: "FAIL", None: "not run"}[self.passed] + (f": {self.why}" if self.why else "")
        difference = "" if self.difference is None else f"{self.difference:.2g}"
        values = [" ".join(f"{x:8.4f}" for x in some[:3]) for some in (self.expected, self.got)]
        return line(self.case, self.weights, self.sampler, *values, difference, f"{self.tolerance:g}", verdict)


def line(*cells: str) -> str:
    return " ".join(f"{cell:<{width}}" for cell, width in zip(cells, WIDTHS, strict=True))


def verify(
    path: str | Path | None = None,
    inputs: str | Path | None = None,
    device: str | torch.device | None = None,
    references: Path = REFERENCES,
) -> Iterator[Result]:
    """The results of all rows that are for this model, the cheap ones first, each as soon as it is there.

    path: a single file or a diffusers folder, None for the default model. It is loaded once, in float32. inputs: the
    folder with the files that the rows ask for; nothing is downloaded. device: as in `Pipeline.from_pretrained`.
    Raises ValueError for a model that has no reference outputs, and what loading raises.
    """
    path = DEFAULT_MODEL if path is None else path
    rows = [(group["weights"], row) for group in groups_for(path, references) for row in group["rows"]]
    rows.sort(key=lambda pair: list(KINDS).index(pair[1]["kind"]))
    pipe = Pipeline.from_pretrained(path, device=device)
    return (run(pipe, weights, row, None if inputs is None else Path(inputs)) for weights, row in rows)


def groups_for(path: str | Path, references: Path = REFERENCES) -> list[dict[str, Any]]:
    """Those that a model's headers and configs allow."""
    report, groups = inspect(path), json.loads(references.read_text("utf-8"))["groups"]
    fitting = [g for g in groups if all(getattr(report, field) == value for field, value in g["model"].items())]
    if not fitting:
        what = ", ".join(filter(None, [report.kind, report.name, report.prediction_type]))
        known = ", ".join(group["weights"] for group in groups)
        raise ValueError(f"{path} ({what}): there are no published outputs for this model, but for {known}")
    return fitting


def matches(results: list[Result]) -> list[str]:
    """The weights of which at least one row was run, and all that were run have passed."""
    ran = [result for result in results if result.passed is not None]
    return [w for w in dict.fromkeys(r.weights for r in ran) if all(r.passed for r in ran if r.weights == w)]


@torch.no_grad()
def run(pipe: Pipeline, weights: str, row: Row, inputs: Path | None) -> Result:
    name: str = row.get("sampler", "")
    sampler, expected = ALIASES.get(name, name), torch.tensor(row["expected"])
    shown = sampler.removesuffix("Scheduler")
    result = Result(row["case"], weights, shown, tuple(row["expected"]), row["tolerance"])
    try:
        if "unable" in row:
            raise NotRun(row["unable"])
        if name and sampler not in SAMPLERS:
            raise NotRun(f"this version has no {shown}")
        output = KINDS[row["kind"]](pipe, row, inputs)
    except NotRun as reason:
        return replace(result, why=str(reason))
    except FloatingPointError as error:  # the weights are not finite, or make values that are not
        return replace(result, got=(np.nan,) * len(expected), difference=np.nan, why=str(error))
    index = tuple(slice(*i) if isinstance(i, list) else i for i in row["at"][1:])
    got = output[0][index].flatten().cpu()
    difference = float((got - expected).abs().max())
    if row.get("measure") == "cosine":
        difference = 1 - float(torch.cosine_similarity(got.double(), expected.double(), dim=0))
    return replace(result, got=tuple(got.tolist()), difference=difference)


# Inputs


def load(given: str, inputs: Path | None, read: Callable[[Path], Any]) -> Any:
    name = given.rpartition("/")[2]
    file = None if inputs is None else inputs / name
    if file is None or not file.is_file():
        raise NotRun(f"--inputs FOLDER with {name} is needed, from {given}")
    try:
        return read(file)
    except (OSError, ValueError, EOFError) as error:
        raise NotRun(f"{file}: {error}") from error


def array(given: Given, row: Row, pipe: Pipeline, inputs: Path | None) -> Tensor:
    """(1,...) in the dtype of the UNet: of the batch only what `at` looks at, the rest has no say in it."""
    if isinstance(given, str):
        values = load(given, inputs, np.load)
    else:
        values = np.random.RandomState(given["seed"]).standard_normal(given["shape"])
    if row.get("recorded") == "float16":
        values = values.astype(np.float16)
    drawn = torch.from_numpy(values[row["at"][0]].astype(np.float32))[None]
    return drawn.to(pipe.device, pipe.unet.conv_in.weight.dtype)


def picture(given: Given, inputs: Path | None) -> Image.Image:
    if isinstance(given, str):
        return load(given, inputs, lambda file: Image.open(file).convert("RGB"))
    return Image.fromarray(np.random.RandomState(given["seed"]).randint(0, 256, given["shape"], np.uint8))


# Kinds of runs


def text(pipe: Pipeline, row: Row, inputs: Path | None) -> Tensor:
    """What the text encoders make of a prompt, (1,77,width)."""
    return pipe.encode_text([row["prompt"]], emphasis=None).context


def unet(pipe: Pipeline, row: Row, inputs: Path | None) -> Tensor:
    """One evaluation of the UNet."""
    x, context = (array(row[name], row, pipe, inputs) for name in ("x", "context"))
    return pipe.unet(x, row["t"], context)


def decode(pipe: Pipeline, row: Row, inputs: Path | None) -> Tensor:
    """Latents, not scaled, through the VAE's decoder."""
    return pipe.vae.decode(array(row["z"], row, pipe, inputs))


def encode(pipe: Pipeline, row: Row, inputs: Path | None) -> Tensor:
    """Pixels through the VAE's encoder, drawn with `seed`, which draws for the whole batch; not scaled."""
    mean, std = pipe.vae.encode(array(row["pixels"], row, pipe, inputs))
    noise = torch.randn(row["batch"], *mean.shape[1:], generator=torch.Generator().manual_seed(row["seed"]))
    return mean + std * noise[row["at"][0]].to(pipe.device)


def autoencode(pipe: Pipeline, row: Row, inputs: Path | None) -> Tensor:
    """Pixels through the VAE and back, by way of the mean."""
    return pipe.vae.decode(pipe.vae.encode(array(row["pixels"], row, pipe, inputs)).mean)


def generate(pipe: Pipeline, row: Row, inputs: Path | None) -> Tensor:
    """A whole run, pixels in [0,1] before they are rounded."""
    given: dict[str, Any] = {name: picture(row[name], inputs) for name in ("image", "mask") if name in row}
    if "noise" in row:
        given["noise"] = array(row["noise"], row, pipe, inputs)
    if "timesteps" in row:
        given["sigmas"] = pipe.schedule.sigma(torch.tensor(row["timesteps"], dtype=torch.float64))
    settings = Settings(sampler=row["sampler"], emphasis=None, **given, **row["settings"])
    lora = load(row["lora"], inputs, pipe.load_lora) if "lora" in row else None
    try:
        latents = pipe.run(settings, progress=False).latents
        assert latents is not None, "of one run"
        return (pipe.decode(latents) / 2 + 0.5).clamp(0, 1)
    finally:
        if lora is not None:
            lora.remove()


# The cheap ones first.
KINDS: dict[str, Callable[[Pipeline, Row, Path | None], Tensor]] = {
    "text": text,
    "unet": unet,
    "decode": decode,
    "encode": encode,
    "autoencode": autoencode,
    "generate": generate,
}
