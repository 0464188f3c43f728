"""What a file or a folder is, told from its headers and configs, and the line of Python that loads it."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path

import ldm.vae.keys
from ldm import folder
from ldm.checkpoint import (
    TINY,
    CheckpointError,
    Opened,
    Plan,
    check_widths,
    existing,
    find_problems,
    make_plans,
    open_model,
    vae_config,
)
from ldm.lora import ADAPTER, ROLES
from ldm.models import SD1, Finding, identify
from ldm.source import Source, views
from ldm.vae import VAE, TinyConfig, VAEConfig

EMA = re.compile(r"model_ema\..*")
BITS = re.compile(r"\d+")  # in the name of a dtype: BF16, F8_E4M3
FAMILIES = {768: "SD 1.x", 1024: "SD 2.x", 2048: "SDXL", 1280: "SDXL refiner"}  # by the width of the text
ENCODERS = {768: "SD 1.x or SDXL", 1024: "SD 2.x", 1280: "SDXL"}  # by their own width
READS_TEXT = re.compile(
    r".*attn2(\.to_k\.weight|[._](processor\.)?to_k(_lora)?\..*(down\.weight|lora_A\..*|hada_w1_b))"
)
READS_TEXT_LOKR = re.compile(r"(.*attn2[._]to_k\.lokr_w)1(_b)?")

# LoRA files: by which names to tell the kind, the rank, the model, and what is changed. Of the kinds the first three
# are loaded.
ALGORITHMS = {
    "LoHa": r".*\.hada_.*",
    "LoKr": r".*\.lokr_.*",
    "DoRA": r".*\.(dora_scale|lora_magnitude_vector.*)",
    "OFT": r".*\.oft_.*",
    "IA3": r".*\.(on_input|ia3_l(\..*)?)",
    "GLoRA": r".*\.[ab][12]\.weight",
    "full differences": r".*\.diff(_b)?",
    "norms": r".*\.[wb]_norm",
    "biases": r".*(up|lora_B(\..*)?)\.bias",
    "embeddings": r"bundle_emb\..*",
}
RANKED = re.compile(r".*(down\.weight|lora_A\.(.*\.)?weight|hada_w1_b|lokr_w[12]_b)")
READS_TE = re.compile(r"lora_te_.*(_proj|fc1)\..*(down\.weight|hada_w1_b)")
ONLY_XL = re.compile(r"(lora_te[12]_|text_encoder_2\.).*")
OTHER_WIDTHS = {3072: "Flux", 1536: "SD 3", 2432: "SD 3"}
OTHER_FAMILIES = {
    "Flux": r"(.*[._])?(double_blocks|single_blocks|single_transformer_blocks)[._].*",
    "SD 3": r"(.*[._])?joint_blocks[._].*",
}
OTHER_BLOCKS = re.compile(r"(transformer\.|lora_transformer_)transformer_blocks.*(down\.weight|lora_A\.(.*\.)?weight)")
IN_UNET = r"(down|up|input|output)_blocks|mid(dle)?_block|conv_(in|out)|time_embed(ding)?|add_embedding|label_emb|out_2"
CHANGED = {
    "text_encoder_2": re.compile(r"(lora_te2_|text_encoder_2\.).*"),
    "text_encoder": re.compile(r"(lora_te1?_|text_encoder\.|base_model\.model\.(text_model\.)?encoder\.).*"),
    "unet": re.compile(rf"(lora_unet_|(unet\.|base_model\.model\.)?)({IN_UNET})[._].*"),
}


@dataclass(frozen=True)
class Report:
    """What a file or folder is. `print(report)` shows what `ldm inspect` shows.

    kind: "model", "VAE", "UNet", "text encoder", "LoRA", "embedding", "ControlNet", "IP-Adapter", "AnimateDiff" or
    "unknown". name: which of them. why: what tells, the decisive tensors with their shapes. parts: those that are
    there, with their number of tensors in the file. dtypes: how many tensors there are of each, by safetensors' names.
    size: of the tensors, in bytes. ema: how many of them are EMA copies. prediction_type: "epsilon", "v_prediction" or
    "" for what is no model. prediction_from: what says so, or that it is a guess. zero_snr: whether the last timestep
    is noise alone. missing, unexpected: tensors, the latter all of them where the file is unknown. problem: why it does
    not load, "" if it does. python: the line that loads it, "" if there is none.
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
    zero_snr: bool = False
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    problem: str = ""
    python: str = ""

    def __str__(self) -> str:
        return "\n".join(f"{title:<11} {line}" for title, line in self._lines())

    def _lines(self) -> Iterator[tuple[str, str]]:
        yield "path", str(self.path)
        yield self.kind, self.name
        yield from zip(["because", *[""] * len(self.why)], self.why, strict=False)
        if self.prediction_type:
            snr = ", zero terminal SNR" if self.zero_snr else ""
            yield "predicts", f"{self.prediction_type}, {self.prediction_from}{snr}"
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
        return model_report(path)
    source = folder.weights(path, None) if path.is_dir() else Source(path, [path])
    finding = identify(source.shapes)
    if finding.kind in ("model", "unknown") or "model_index.json" in source.metadata:
        return model_report(path, finding, source)
    report = basic(path, [source], finding)
    match finding.kind:
        case "VAE":
            return vae_report(report, source, vae_config(path, source, SD1.vae))
        case "LoRA":
            return lora_report(report, source)
        case "embedding":
            return embedding_report(report, source)
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


def model_report(path: Path, finding: Finding | None = None, source: Source | None = None) -> Report:
    """finding: what the tensors of a single file, or of a folder's part, told. source: where they are."""
    try:
        opened = open_model(path, source=source)
    except CheckpointError as error:
        finding = finding or Finding("model", "diffusers folder", None, {})
        found = listed(source, source.shapes) if source and finding.kind == "unknown" else ()
        return replace(basic(path, [source] if source else [], finding), unexpected=found, problem=str(error))
    plans = make_plans(opened.model, opened.sources)
    problems = find_problems(plans)
    report = basic(path, list(dict.fromkeys(opened.sources.values())), finding or Finding("model", "", None, {}))
    absent = [part for part, plan in plans.items() if not plan.found]
    if finding is None or finding.model is None:
        c = opened.model.unet
        said = f"its configs say {c.in_channels} channels in, and text of width {c.context_width}"
        report = replace(report, why=(said,))
    try:
        if path.is_dir() or "model_index.json" in opened.sources["unet"].metadata:
            opened.tokenizers()  # of files of its own, which may be missing or broken
        check_widths(opened.model, path)
        problem = "it does not fit: see above" if problems else ""
        loads = not problems or ([len(lines) for lines in problems.values()] == [1] and absent == ["vae"])
    except CheckpointError as error:
        problem, loads = str(error), False
    return replace(
        report,
        kind="model",
        name=opened.name,
        parts={part: stored(plan) for part, plan in plans.items() if plan.found},
        prediction_type=opened.model.scheduler["prediction_type"],
        prediction_from=opened.prediction_from,
        zero_snr=bool(opened.model.scheduler.get("rescale_betas_zero_snr", False)),
        missing=tuple(problems.get("missing", ())),
        unexpected=tuple(line for kind, lines in problems.items() if kind != "missing" for line in lines),
        problem=problem,
        python=load_line(path, opened, absent) if loads else "",
    )


def stored(plan: Plan) -> int:
    """How many tensors of the file a net takes: of OpenCLIP's stacked q, k and v the file has one."""
    asked = set(plan.theirs.values())
    return sum(not asked.isdisjoint(views(name, shape)) for name, (_, shape) in plan.source.stored.items())


def listed(source: Source, names: Iterable[str]) -> tuple[str, ...]:
    return tuple(f"{name} {source.shapes[name]}" for name in names)


def load_line(path: Path, opened: Opened, absent: list[str]) -> str:
    arguments = repr(str(path)) + (", vae=VAE_FILE" if absent else "")
    if opened.prediction_from.startswith("a guess"):
        arguments += f', prediction_type="{opened.model.scheduler["prediction_type"]}"'
    line = f"ldm.Pipeline.from_pretrained({arguments})"
    refines = opened.model.text_encoder is None
    return f"base(prompt, refiner={line})" if refines else f"pipe = {line}"


def vae_report(report: Report, source: Source, config: VAEConfig) -> Report:
    """Of a file that has a VAE alone. SD 1, SD 2 and SDXL have the same shapes."""
    plan = Plan(VAE, config, source, ldm.vae.keys.spellings, ldm.vae.keys.PREFIX)
    problems = find_problems({"vae": plan})
    firsts = (r"(.*\.)?decoder\.conv_in\.weight", re.escape(TINY))
    latents = next((s[1] for n, s in source.shapes.items() if re.fullmatch("|".join(firsts), n) and len(s) > 1), 0)
    known = SD1.vae.latent_channels
    fits = not problems and latents == known
    tiny = "TAESD, " if isinstance(config, TinyConfig) else ""
    ours = fits and (tiny or config == SD1.vae)
    return replace(
        report,
        name=f"{tiny}of {latents} latent channels" + (", for SD 1.x, SD 2.x or SDXL" if ours else ""),
        parts={"vae": stored(plan)},
        missing=tuple(problems.get("missing", ())),
        unexpected=tuple(line for kind, lines in problems.items() if kind != "missing" for line in lines),
        problem="" if fits else f"this version does VAEs of {known} latent channels, shaped as SD 1's",
        python=f"pipe = ldm.Pipeline.from_pretrained(MODEL, vae={str(report.path)!r})" if fits else "",
    )


def embedding_report(report: Report, source: Source) -> Report:
    sizes = " and ".join(f"{name} {shape}" for name, shape in source.shapes.items())
    one = len(source.shapes) == 1 or source.shapes.keys() == {"clip_g", "clip_l"}
    if not one or any(len(shape) not in (1, 2) or 0 in shape for shape in source.shapes.values()):
        problem = "an embedding is one tensor, or clip_l and clip_g, each a vector or some in the rows of a matrix"
        return replace(report, unexpected=listed(source, source.shapes), problem=problem)
    python = f"pipe.load_embedding({str(report.path)!r})"
    return replace(report, name=f"vectors: {sizes}", python=python, problem="")


def family_of(source: Source) -> str | None:
    """The model that a UNet, a text encoder or a LoRA is for, by the width of the text."""
    for name, shape in source.shapes.items():
        if len(shape) > 1 and READS_TEXT.fullmatch(name):
            return FAMILIES.get(shape[1], f"an unknown model, with text of width {shape[1]}")
        if len(shape) > 1 and name.endswith("token_embedding.weight"):
            return ENCODERS.get(shape[1], f"an unknown model, with text of width {shape[1]}")
    return None


def lora_report(report: Report, source: Source) -> Report:
    """Told by the names alone: whether all of them are a model's is seen when it is loaded."""
    parts = {name: part for name in source.shapes for part, own in CHANGED.items() if own.fullmatch(name)}
    foreign = [name for name in source.shapes if role_of(name) is None or name not in parts]
    kinds = kinds_of(source)
    ranks = sorted({shape[0] for name, shape in source.shapes.items() if RANKED.fullmatch(name) and shape})
    rank = f", rank {', '.join(map(str, ranks))}" if ranks else ""
    family = lora_family(source) or "a model that its names do not tell"
    refused = (
        f"{len(foreign):,} of its {len(source.shapes):,} tensors are not known: this version does LoRA, LoHa, LoKr and"
        " DoRA for the UNet and the text encoders of Stable Diffusion, under kohya's, diffusers' and PEFT's names"
    )
    return replace(
        report,
        name=f"{' and '.join(kinds)}{rank}, for {family}",
        parts=dict(Counter(parts.values())),
        unexpected=listed(source, foreign),
        problem=refused if foreign else "",
        python="" if foreign else f"pipe.load_lora({str(report.path)!r})",
    )


def role_of(name: str) -> str | None:
    """What a tensor is, by how its name ends."""
    words = ADAPTER.sub(r"\1.weight", name).split(".")
    return next((role for i in range(1, len(words)) if (role := ROLES.get(".".join(words[i:])))), None)


def kinds_of(source: Source) -> list[str]:
    names = "\n".join(source.shapes)
    kinds = [kind for kind, pattern in ALGORITHMS.items() if re.search(f"^{pattern}$", names, re.MULTILINE)]
    plain = any(role_of(name) in ("up", "down") for name in source.shapes)
    return ["LoRA", *kinds] if plain or not kinds else kinds


def lora_family(source: Source) -> str | None:
    shapes = {name: shape for name, shape in source.shapes.items() if len(shape) > 1}
    for family, pattern in OTHER_FAMILIES.items():
        if any(re.fullmatch(pattern, name) for name in source.shapes):
            return family
    if width := next((shape[1] for name, shape in shapes.items() if OTHER_BLOCKS.fullmatch(name)), None):
        return OTHER_WIDTHS.get(width)
    if family_by_text := family_of(source):
        return family_by_text
    for name, shape in shapes.items():  # of a Kronecker product the widths multiply
        if match := READS_TEXT_LOKR.fullmatch(name):
            second = next((shapes[n] for end in ("2", "2_b") if (n := match[1] + end) in shapes), (0, 0))
            return FAMILIES.get(shape[1] * second[1])
    if any(ONLY_XL.fullmatch(name) for name in source.shapes):
        return "SDXL"
    width = next((shape[1] for name, shape in shapes.items() if READS_TE.fullmatch(name)), 0)
    return FAMILIES.get(width)
