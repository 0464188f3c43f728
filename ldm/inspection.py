"""What a file or a folder is, told from its headers and configs, and the line of Python that loads it."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path

import ldm.vae.keys
from ldm import folder
from ldm.checkpoint import CheckpointError, Opened, Plan, check_widths, existing, find_problems, make_plans, open_model
from ldm.models import SD1, Finding, identify
from ldm.source import Source
from ldm.vae import VAE, VAEConfig

EMA = re.compile(r"model_ema\..*")
BITS = re.compile(r"\d+")  # in the name of a dtype: BF16, F8_E4M3
FAMILIES = {768: "SD 1.x", 1024: "SD 2.x", 2048: "SDXL", 1280: "SDXL refiner"}  # by the width of the text
READS_TEXT = re.compile(r".*attn2[._](processor\.)?to_k(_lora)?\.(weight|.*(down\.weight|lora_A\..*|hada_w1_b))")

# LoRA files: by which names to tell the kind, the rank, and what is changed.
ALGORITHMS = {"LoHa": r".*\.hada_.*", "LoKr": r".*\.lokr_.*", "DoRA": r".*\.(dora_scale|lora_magnitude_vector.*)"}
RANKED = re.compile(r".*(down\.weight|lora_A\.(.*\.)?weight|hada_w1_b|lokr_w[12]_b)")
CHANGED = {
    "text_encoder_2": re.compile(r"(lora_te2_|text_encoder_2\.).*"),
    "text_encoder": re.compile(r"(lora_te1?_|text_encoder\.).*"),
    "unet": re.compile(r"(lora_unet_|unet\.|(base_model\.model\.)?(conv_in|down_blocks|mid_block|up_blocks)\.).*"),
}


@dataclass(frozen=True)
class Report:
    """What a file or folder is. `print(report)` shows what `ldm inspect` shows.

    kind: "model", "VAE", "UNet", "text encoder", "LoRA", "embedding", "ControlNet" or "unknown". name: which of them.
    why: what tells, the decisive tensors with their shapes. parts: those that are there, with their number of tensors.
    dtypes: how many tensors there are of each, by safetensors' names. size: of the tensors, in bytes. ema: how many of
    them are EMA copies. prediction_type: "epsilon", "v_prediction" or "" for what is no model. prediction_from: what
    says so, or that it is a guess. missing, unexpected: tensors. problem: why it does not load, "" if it does.
    python: the line that loads it, "" if there is none.
    """

    path: Path
    kind: str
    name: str
    why: tuple[str, ...]
    dtypes: Mapping[str, int]
    size: int
    ema: int
    parts: Mapping[str, int] = field(default_factory=dict)
    prediction_type: str = ""
    prediction_from: str = ""
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    problem: str = ""
    python: str = ""

    def __str__(self) -> str:
        return "\n".join(f"{title:<12}{line}" for title, line in self._lines())

    def _lines(self) -> Iterator[tuple[str, str]]:
        yield "path", str(self.path)
        yield self.kind, self.name
        yield from zip(["because", *[""] * len(self.why)], self.why, strict=False)
        if self.prediction_type:
            yield "predicts", f"{self.prediction_type}, {self.prediction_from}"
        yield "tensors", ", ".join(f"{n:,} {dtype}" for dtype, n in self.dtypes.items()) + f", {self.size:,} bytes"
        if self.ema:
            yield "EMA", f"{self.ema:,} of them are EMA copies, which are not loaded"
        if self.parts:
            yield "parts", ", ".join(f"{part} ({count:,} tensors)" for part, count in self.parts.items())
        for title, lines in {"missing": self.missing, "unexpected": self.unexpected}.items():
            shown = lines if len(lines) <= 5 else (*lines[:5], f"and {len(lines) - 5:,} more")
            yield from zip([title, *[""] * len(shown)], shown, strict=False)
        if self.problem:
            yield "problem", self.problem
        if self.python:
            yield "load it", self.python


def inspect(path: str | Path) -> Report:
    """Read the header of a safetensors file, or the headers and configs of a diffusers folder, and say what it is.

    No weights are read, but for the 320 numbers from which SD 2's way of predicting is guessed. Raises CheckpointError
    for what is no readable safetensors file or diffusers folder at all.
    """
    path = existing(path)
    if (path / "model_index.json").is_file():
        return model_report(path, None)
    source = folder.weights(path, None) if path.is_dir() else Source(path, [path])
    finding = identify(source.shapes)
    if finding.kind in ("model", "unknown") or "model_index.json" in source.metadata:
        return model_report(path, finding)
    report = basic(path, [source], finding)
    match finding.kind:
        case "VAE":
            return vae_report(report, source, folder.vae_config(path) if path.is_dir() else SD1.vae)
        case "LoRA":
            python = f'pipe.load_lora("{path}")'
            return replace(report, name=lora_name(source), parts=lora_parts(source), python=python, problem="")
        case "embedding":
            sizes = " and ".join(f"{name} {shape}" for name, shape in source.shapes.items())
            python = f'pipe.load_embedding("{path}")'
            return replace(report, name=f"vectors: {sizes}", python=python, problem="")
        case "UNet" | "text encoder" if family := family_of(source):
            return replace(report, name=f"{finding.name}, of {family}")
    return report


def basic(path: Path, sources: list[Source], finding: Finding) -> Report:
    stored = [tensor for source in sources for tensor in source.stored.items()]
    return Report(
        path,
        finding.kind,
        finding.name,
        tuple(f"{name} is {shape}" for name, shape in finding.why.items()),
        dict(Counter(dtype for _, (dtype, _) in stored).most_common()),
        sum(prod(shape) * bits(dtype) for _, (dtype, shape) in stored) // 8,
        sum(EMA.fullmatch(name) is not None for name, _ in stored),
        problem=finding.advice,
    )


def bits(dtype: str) -> int:
    return int(found.group()) if (found := BITS.search(dtype)) else 8  # BOOL


def model_report(path: Path, finding: Finding | None) -> Report:
    """finding: what the tensors of a single file told."""
    try:
        opened = open_model(path)
    except CheckpointError as error:
        finding = finding or Finding("model", "diffusers folder", None, {})
        sources = [Source(path, [path])] if path.is_file() else []
        return replace(basic(path, sources, finding), problem=str(error))
    plans = make_plans(opened.model, opened.sources)
    problems = find_problems(plans)
    report = basic(path, list(dict.fromkeys(opened.sources.values())), finding or Finding("model", "", None, {}))
    absent = [part for part, plan in plans.items() if not plan.found]
    if finding is None or finding.model is None:
        c = opened.model.unet
        said = f"its configs say {c.in_channels} channels in, and text of width {c.context_width}"
        report = replace(report, why=(said,))
    try:
        check_widths(opened.model, path)
        problem = "it does not fit: see below" if problems else ""
    except CheckpointError as error:
        problem = str(error)
    return replace(
        report,
        kind="model",
        name=opened.name,
        parts={part: plan.found for part, plan in plans.items() if plan.found},
        prediction_type=opened.model.scheduler["prediction_type"],
        prediction_from=opened.prediction_from,
        missing=tuple(problems.get("missing", ())),
        unexpected=tuple(line for kind, lines in problems.items() if kind != "missing" for line in lines),
        problem=problem,
        python=load_line(path, opened, absent) if not problem or absent == ["vae"] else "",
    )


def load_line(path: Path, opened: Opened, absent: list[str]) -> str:
    arguments = f'"{path}"' + (", vae=VAE_FILE" if absent else "")
    if opened.prediction_from.startswith("a guess"):
        arguments += f', prediction_type="{opened.model.scheduler["prediction_type"]}"'
    line = f"ldm.Pipeline.from_pretrained({arguments})"
    refines = opened.model.text_encoder is None
    return f"base(prompt, refiner={line})" if refines else f"pipe = {line}"


def vae_report(report: Report, source: Source, config: VAEConfig) -> Report:
    """Of a file that has a VAE alone. SD 1, SD 2 and SDXL have the same shapes."""
    plan = Plan(VAE, config, source, ldm.vae.keys.spellings, ldm.vae.keys.PREFIX)
    problems = find_problems({"vae": plan})
    latents = next((s[1] for n, s in source.shapes.items() if n.endswith("decoder.conv_in.weight") and len(s) > 1), 0)
    fits = not problems and latents == config.latent_channels
    return replace(
        report,
        name=f"of {latents} latent channels" + (", for SD 1.x, SD 2.x or SDXL" if fits and config == SD1.vae else ""),
        parts={"vae": plan.found},
        missing=tuple(problems.get("missing", ())),
        unexpected=tuple(line for kind, lines in problems.items() if kind != "missing" for line in lines),
        problem="" if fits else f"this version does VAEs of {config.latent_channels} latent channels, shaped as SD 1's",
        python=f'pipe = ldm.Pipeline.from_pretrained(MODEL, vae="{report.path}")' if fits else "",
    )


def family_of(source: Source) -> str | None:
    """The model that a UNet, a text encoder or a LoRA is for, by the width of the text."""
    for name, shape in source.shapes.items():
        if len(shape) > 1 and (READS_TEXT.fullmatch(name) or name.endswith("token_embedding.weight")):
            return FAMILIES.get(shape[1], f"an unknown model, with text of width {shape[1]}")
    return None


def lora_name(source: Source) -> str:
    names = "\n".join(source.shapes)
    kinds = [kind for kind, pattern in ALGORITHMS.items() if re.search(f"^{pattern}$", names, re.MULTILINE)]
    if not set(kinds) & {"LoHa", "LoKr"}:
        kinds.insert(0, "LoRA")
    ranks = sorted({shape[0] for name, shape in source.shapes.items() if RANKED.fullmatch(name) and shape})
    rank = f", rank {', '.join(map(str, ranks))}" if ranks else ""
    return f"{' and '.join(kinds)}{rank}, for {family_of(source) or 'a model that its names do not tell'}"


def lora_parts(source: Source) -> dict[str, int]:
    parts = Counter(part for name in source.shapes for part, own in CHANGED.items() if own.fullmatch(name))
    return dict(parts)
