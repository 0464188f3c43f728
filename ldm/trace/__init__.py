"""A run that was recorded: every step with its tensors, and how much every place of the picture looked at every word.

    trace = pipe.trace("a red heart", seed=0)                            # or file="run.safetensors", in flat memory
    trace[3].x0, trace.curves()["cosine"], trace.attention()             # tensors
    trace.plot().savefig("run.png"); trace.to_html("run.html", beside=other)
    print(trace.compare(other))                                          # where two runs part

A trace is a consumer of the run's own loop; with it the run is bitwise what it is without.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ldm.image import place, to_images
from ldm.maps import capture, shares
from ldm.parameters import parameters
from ldm.pipeline import Pipeline
from ldm.preview import Preview, fit
from ldm.replay import with_files
from ldm.run import begin, one_run
from ldm.samplers import Step
from ldm.save import write_file
from ldm.settings import Settings
from ldm.trace.file import Growing, Opened

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ldm.trace.compare import Comparison

Decode = Callable[[Tensor], Tensor]  # latents (B,4,h,w) -> (B,3,H,W), as Pipeline.decode


@dataclass(frozen=True, eq=False)
class Trace:
    """`trace[i]` is the Step i, its tensors on the CPU; `len(trace)` their number.

    tensors: of all steps, 0003.x, ...; "start" (B,4,h,w) is x at the first sigma. If there is a file, each is read from
    it when it is asked for. texts: how each picture was made, as its own file would say. words: of each prompt. ran:
    what else decided it, the model's hash, what its nets are, the machine.
    """

    tensors: Mapping[str, Tensor]
    texts: list[str]
    words: list[list[str]]
    steps: int
    file: Path | None = None
    ran: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def load(cls, file: str | Path) -> "Trace":
        """Raises ValueError for a file that is no trace."""
        tensors = Opened(Path(file))
        try:
            about = json.loads(tensors.metadata["trace"])
            return cls(tensors, about["texts"], about["words"], about["steps"], Path(file), about.get("ran", {}))
        except (KeyError, TypeError, ValueError) as error:
            why = "no trace; give a file that pipe.trace(..., file=) or trace.save(file) wrote"
            raise ValueError(f"{file}: {why}") from error

    def save(self, file: str | Path, force: bool = False) -> Path:
        """One safetensors file, for `load`; the name that it took, with a number if there was one, unless `force`."""
        return place(checked(file), lambda part: write_file(part, self.tensors, self._metadata()), force)

    def _metadata(self) -> dict[str, str]:
        about = {"texts": self.texts, "words": self.words, "steps": self.steps, "ran": dict(self.ran)}
        return {"trace": json.dumps(about)}

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Step]:
        return (self[i] for i in range(self.steps))

    def __getitem__(self, i: int) -> Step:
        if not -self.steps <= i < self.steps:
            raise IndexError(f"step {i} of {self.steps}")
        i %= self.steps
        found = {name: self.tensors.get(f"{i:04}.{name}") for name in Step._fields[1:]}
        return Step(i, **found)  # type: ignore[arg-type]

    def check(self, picture: int) -> None:
        """Raises ValueError for a picture that the run did not make."""
        if not 0 <= picture < len(self.texts):
            raise ValueError(f"picture={picture}: the run made {len(self.texts)}, give 0 to {len(self.texts) - 1}")

    def only(self, picture: int) -> "Trace":
        """The trace of one picture of the batch, in memory."""
        self.check(picture)
        kept = {}
        for name, tensor in self.tensors.items():
            step, _, what = name.partition(".")
            if what.startswith("words."):
                if what == f"words.{picture}":
                    kept[f"{step}.words.0"] = tensor
            else:
                kept[name] = tensor[picture : picture + 1] if tensor.ndim == 4 else tensor
        return Trace(kept, [self.texts[picture]], [self.words[picture]], self.steps, ran=self.ran)

    @property
    def start(self) -> Tensor:
        """x (B,4,h,w) at the first sigma."""
        return self.tensors["start"]

    @property
    def preview(self) -> Preview:
        """Latents to colours, as the run's VAE has them."""
        return Preview(self.tensors["preview.weight"], self.tensors["preview.bias"])

    def attention(self, picture: int = 0) -> Tensor:
        """(n,words,h,w): in each step, the share of what a place looks at that is the word's (`ldm.maps`).

        NaN in steps of another net than the pipeline's, a refiner.
        """
        self.check(picture)
        return torch.stack([self.tensors[f"{i:04}.words.{picture}"] for i in range(self.steps)])

    def curves(self) -> dict[str, Tensor]:
        """What a run looks like in numbers, float64 (n,B), NaN where a step has none; sigma is (n,).

        x0, eps, eps_cond, eps_uncond: root mean squares. cosine: between eps_cond and eps_uncond. scale: the strength
        of guidance that was in effect, the s by which eps comes nearest to eps_uncond + s (eps_cond - eps_uncond).
        """
        rows: dict[str, list[Tensor]] = {}
        for step in self:
            row = {"sigma": step.sigma.double()}
            given = {"x0": step.x0, "eps": step.eps, "eps_cond": step.eps_cond, "eps_uncond": step.eps_uncond}
            none = torch.full(step.x.shape[:1], torch.nan, dtype=torch.float64)
            flat = {name: None if value is None else value.double().flatten(1) for name, value in given.items()}
            for name, value in flat.items():
                row[name] = none if value is None else value.square().mean(dim=1).sqrt()
            row |= {"cosine": none, "scale": none}
            eps, cond, uncond = flat["eps"], flat["eps_cond"], flat["eps_uncond"]
            if eps is not None and cond is not None and uncond is not None:
                apart = cond - uncond
                row["cosine"] = (cond * uncond).sum(dim=1) / (cond.norm(dim=1) * uncond.norm(dim=1))
                row["scale"] = ((eps - uncond) * apart).sum(dim=1) / apart.square().sum(dim=1)
            for name, value in row.items():
                rows.setdefault(name, []).append(value)
        return {name: torch.stack(values) for name, values in rows.items()}

    def pictures(self, what: str = "x0", picture: int = 0, decode: Decode | None = None) -> list[Image.Image]:
        """A picture for each step of "x0" as predicted, or "x" as it was then, in the VAE's scale.

        Small ones by the linear preview; or by `decode`, as pipe.decode, which takes its time.
        """
        if what not in ("x0", "x"):
            raise ValueError(f"pictures of {what!r}: there are those of 'x0' and 'x'")
        self.check(picture)
        made = []
        for step in self:
            z = step.x0 if what == "x0" else step.x / (1 + step.sigma_next**2) ** 0.5
            made += to_images((decode or self.preview)(z[picture : picture + 1]))
        return made

    def plot(self, picture: int = 0, decode: Decode | None = None) -> "Figure":
        """A figure of matplotlib (extra `plot`), to show or to save: pictures of x0, the curves, the words' maps."""
        from ldm.trace.plot import plot

        self.check(picture)
        return plot(self, picture, decode)

    def to_html(
        self,
        file: str | Path,
        beside: "Trace | None" = None,
        picture: int = 0,
        decode: Decode | None = None,
        force: bool = False,
    ) -> Path:
        """One page that needs nothing else: pictures, words and curves of every step, perhaps `beside` another run.

        picture: which of a batch. decode: as in `pictures`. The name that it took is returned, see `save`.
        """
        from ldm.trace.page import page

        text = page([self] if beside is None else [self, beside], picture, decode)
        return place(Path(file), lambda part: part.write_text(text, encoding="utf-8"), force)

    def compare(self, other: "Trace") -> "Comparison":
        """Where two runs part and by how much, and which settings differ; to print."""
        from ldm.trace.compare import compare

        return compare(self, other)


def shown(words: list[str]) -> list[tuple[int, str]]:
    """Those worth a map, each with its place: with a letter or digit in them."""
    return [(i, word) for i, word in enumerate(words) if any(map(str.isalnum, word))]


def checked(file: str | Path) -> Path:
    """Raises ValueError for a name that cannot be a trace's."""
    file = Path(file)
    if file.suffix != ".safetensors" or not file.resolve().parent.is_dir():
        raise ValueError(f"trace {file}: give a name that ends in .safetensors, in a folder that exists")
    return file


def record(
    pipe: Pipeline, s: Settings, file: str | Path | None = None, progress: bool = True, force: bool = False
) -> Trace:
    """Run the settings and keep every step: in memory, or with `file` there, which appears when it is whole.

    force: as in `Trace.save`. Raises ValueError for settings that make several runs, or no step.
    """
    one_run(s, "a trace shows one run")
    target = None if file is None else checked(file)
    ran = pipe.about(s)
    options = with_files(ran.options)
    name, preview, pipe = pipe.name, fit(pipe), pipe._tiled(s.tiling)
    plans = [pipe.plan(text, s.how.emphasis) for text in s.texts]
    with torch.no_grad():
        run = begin(pipe, s)
    if len(run.sigmas) < 2:
        raise ValueError(f"strength={s.strength} makes no step that could be traced: give more, up to 1")
    memory: dict[str, Tensor] = {}
    kept: dict[str, Tensor] | Growing = memory if target is None else Growing(target.resolve().parent)

    def keep(name: str, value: Tensor) -> None:
        kept[name] = value.detach().cpu().clone()  # whoever takes the steps may change them in place

    keep("start", run.x)
    keep("preview.weight", preview.weight)
    keep("preview.bias", preview.bias)
    count, grid = 0, torch.Size((1, 1))
    with tqdm(total=len(run.sigmas) - 1, disable=not progress) as bar:
        while True:
            with capture(pipe.unet) as maps:
                step = next(run.steps, None)
            if step is None:
                break
            for part, value in step._asdict().items():
                if isinstance(value, Tensor):
                    keep(f"{count:04}.{part}", value)
            heat = maps.heat(s.count) if len(maps) else torch.full((s.count, 1, *grid), torch.nan)
            grid = heat.shape[-2:]
            for i, plan in enumerate(plans):
                words = [share for _, share in shares(heat[i], plan)] if len(maps) else [heat[i, 0]] * len(plan.words)
                keep(f"{count:04}.words.{i}", torch.stack(words) if words else heat.new_zeros(0, *grid))
            count += 1
            bar.update()
    if not count:
        raise ValueError(f"the sampler {s.sampler_name!r} ended without a step: it has {len(run.sigmas) - 1}")
    texts = [parameters(s, i, run.size, name, options) for i in range(s.count)]
    told = ran.known_nets() | {
        name: ran.machine[name] for name in ("processor", "threads")
    }  # versions are in the texts
    made = Trace(memory, texts, [[word for word, _ in plan.words] for plan in plans], count, ran=told)
    if target is None or not isinstance(kept, Growing):
        return made
    return Trace.load(kept.save(target, made._metadata(), force))
