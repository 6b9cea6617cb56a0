"""Bias and variance of every likelihood estimator, against what is exact, on denoisers that can be enumerated.

    python benchmarks/estimators.py

A denoiser of four slots and three tokens has logits that are linear in which token is in which other slot, one weight
per slot, other slot, its token (or the mask) and predicted token: 156 parameters, in float64. All completions, masks
and orders are enumerated, so that likelihoods, their gradients and the policy gradient of an expected reward are exact;
estimators are drawn as in training, `--draws` times for each of `--models` random models. Writes
`benchmarks/results/estimators.json`, `.md` and `.png`; takes about two minutes on one core.

What "exact likelihood" means depends on how completions come about. There are four ways, each with its log-likelihood
log p(y): all slots in one step, from left to right, in uniformly random order, and in blocks of two from left to right
with a random order in each. What an estimator is an estimate of, its target, is a fifth and sixth quantity for bounds:

    mean field         sum_i log p(y_i | nothing)                    = log p of one step
    left-to-right      sum_i log p(y_i | y_<i)                       = log p of left to right
    any-order bound    E_order sum_i log p(y_i | those before it)    <= log p of random order
    block bound        sum_b of the any-order bound of y_b | y_<b    <= log p of blocks

Each estimator is compared with its target by value, and with the decoding that the target belongs to by gradient: with
baseline E[R] and completions from that decoding, the gradient of E[R] is the mean of (R - E[R]) times the gradient of
log p(y). Prompts are left out: the model has none, and so prompt masking changes nothing.

What completions of a prompt gain or lose by having the same masks (`views_keyed_by="prompt"`) is measured by itself:
the noise of the gradient of a group of completions, for the estimators that allow it. There the mean field has the
first two slots for a prompt, which it masks.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import one_hot
from tqdm.auto import tqdm

from rl4dlm.evaluation import machine, versions
from rl4dlm.likelihood.blockwise import BlockELBO, BlockwiseBound
from rl4dlm.likelihood.complementary import Complementary
from rl4dlm.likelihood.coupled import Coupled
from rl4dlm.likelihood.elbo import ELBO
from rl4dlm.likelihood.estimator import Estimator
from rl4dlm.likelihood.iid import IIDRatio
from rl4dlm.likelihood.left_to_right import LeftToRight
from rl4dlm.likelihood.mean_field import MeanField
from rl4dlm.likelihood.quadrature import Quadrature
from rl4dlm.likelihood.strata import Strata
from rl4dlm.likelihood.views import Rows

ROOT = Path(__file__).resolve().parent.parent
LENGTH, TOKENS, MASK, BLOCK = 4, 3, 3, 2
COMPLETIONS = torch.tensor(list(itertools.product(range(TOKENS), repeat=LENGTH)))  # [81, 4]
MASKS = torch.tensor(list(itertools.product([False, True], repeat=LENGTH)))  # [16, 4]
PARAMETERS = LENGTH * (1 + (LENGTH - 1) * (TOKENS + 1)) * TOKENS
PLACES = 2 ** torch.arange(LENGTH).flip(0)  # of a mask among MASKS
FULL = [0, 1, 2, 3]
ORDERS = {
    "random order": [list(order) for order in itertools.permutations(FULL)],
    "blocks": [[*a, *b] for a in ([0, 1], [1, 0]) for b in ([2, 3], [3, 2])],
    "left to right": [FULL],
}
DECODING = {
    "mean field": "one step",
    "left-to-right": "left to right",
    "any-order bound": "random order",
    "block bound": "blocks",
}


@dataclass(frozen=True)
class Entry:
    """An estimator.

    Args:
        name, settings: in words. estimator: it. target: what it is an estimate of, a key of `DECODING`.
    """

    name: str
    settings: str
    estimator: Estimator
    target: str

    @property
    def infinite_variance(self) -> bool:
        """Whether a token counts 1/t where it is hidden with a probability t that may be anything above zero."""
        found = self.estimator
        if isinstance(found, IIDRatio):
            return found.weight == "level" and found.level_range[0] == 0
        return isinstance(found, ELBO) and found.form == "bernoulli" and found.level_range[0] == 0


def elbo(count: int, form: str, settings: str = "", name: str = "ELBO", **more: Any) -> Entry:
    words = ", ".join(part for part in (form, settings) if part)
    return Entry(name, words, ELBO(count, form, **more), "any-order bound")


def spg(count: int, bound: str, words: str, **more: Any) -> Entry:
    estimator = BlockwiseBound(count, bound=bound, block_length=BLOCK, **more)
    return Entry("SPG", words, estimator, "block bound")


ENTRIES = [
    Entry("mean field", "diffu-GRPO, wd1", MeanField(0.0), "mean field"),
    Entry("left to right", "JustGRPO", LeftToRight(), "left-to-right"),
    Entry("left to right", "2 tokens per view", LeftToRight(2), "left-to-right"),
    *(elbo(k, "bernoulli", stratify="none") for k in (1, 4, 16)),
    *(elbo(k, "bernoulli", "levels spread") for k in (4, 16)),
    *(elbo(k, "bernoulli", "pairs", complement=True) for k in (2, 4)),
    *(elbo(k, "count", stratify="none") for k in (1, 2, 4, 8, 16)),
    *(elbo(k, "count", "levels spread: BGPO, VRPO") for k in (2, 4, 8, 16)),
    *(elbo(k, "count_with_zero", "pairs: ESPO", complement=True) for k in (2, 4, 8, 16)),
    *(elbo(k, "count", "pairs", complement=True) for k in (2, 4, 8, 16)),
    elbo(4, "bernoulli_count", "pairs, levels (.1, 1): DMPO", complement=True, stratify="none", level_range=(0.1, 1)),
    *(Entry("quadrature", "independent tokens", Quadrature(n), "any-order bound") for n in (1, 2, 3, 4)),
    Entry("quadrature", "counts / level: GDPO", Quadrature(3, masks="count"), "any-order bound"),
    Entry("quadrature", "counts / count", Quadrature(3, masks="count", weight="count"), "any-order bound"),
    Entry("independent", "levels uniform, 1/t", IIDRatio(levels="uniform", weight="level"), "any-order bound"),
    Entry("independent", "levels uniform, weight 1: UniGRPO", IIDRatio(levels="uniform"), "any-order bound"),
    Entry("complementary", "1 pair: Dream-Coder", Complementary(), "any-order bound"),
    Entry("coupled", "1 pair: coupled-GRPO", Coupled(), "any-order bound"),
    Entry("coupled", "4 pairs", Coupled(4), "any-order bound"),
    *(Entry("strata", f"{q} strata: DACA", Strata(q), "any-order bound") for q in (2, 4)),
    *(Entry("block ELBO", "", BlockELBO(k, BLOCK), "block bound") for k in (1, 2, 4, 8)),
    *(spg(2, bound, words) for bound, words in (("elbo", "lower"), ("eubo", "upper"), ("mix", "mix"))),
    spg(8, "mix", "mix"),
    Entry("SPG", "lower, whole canvas", BlockwiseBound(2, "random", "elbo", p_mask_prompt=0.0), "any-order bound"),
]


GROUP, PROMPT = 8, 2
SHARED = [
    Entry("mean field", "prompt tokens masked with p = .15: d1", MeanField(0.15), "mean field"),
    Entry("mean field", "prompt tokens masked with p = .5", MeanField(0.5), "mean field"),
    Entry("independent", "levels uniform, weight 1: UniGRPO", IIDRatio(levels="uniform"), "any-order bound"),
    Entry("coupled", "1 pair: coupled-GRPO", Coupled(), "any-order bound"),
]
"""Estimators whose masks completions of a prompt may share."""


def main() -> None:
    """Measures, then writes table and plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=2000, help="of every estimator, for each model")
    parser.add_argument("--models", type=int, default=3, help="random models, whose results are averaged")
    parser.add_argument("--scale", type=float, default=1.0, help="standard deviation of the models' weights")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args()
    started = time.process_time()
    models = [Denoiser(seed, options.scale) for seed in range(options.models)]
    results = []
    for entry in tqdm(ENTRIES, desc="measuring", unit="estimator"):
        found = [measure(entry, model, options.draws, seed) for seed, model in enumerate(models)]
        mean = {key: sum(each[key] for each in found) / len(found) for key in found[0]}
        mean["bias_error"] /= len(found) ** 0.5
        results.append(
            {
                "estimator": entry.name,
                "settings": entry.settings,
                "definition": str(entry.estimator),
                "target": entry.target,
                "decoding": DECODING[entry.target],
                "reweighted": entry.estimator.reweighted,
                "infinite_variance": entry.infinite_variance,
                **mean,
            }
        )
    shared = []
    for entry in tqdm(SHARED, desc="measuring groups", unit="estimator"):
        found = [measure_group(entry, model, options.draws, seed) for seed, model in enumerate(models)]
        mean = {key: sum(each[key] for each in found) / len(found) for key in found[0]}
        shared.append({"estimator": entry.name, "settings": entry.settings, "definition": str(entry.estimator), **mean})
    gaps = [model.gaps() for model in models]
    report = {
        "command": "python benchmarks/" + " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "model": {"slots": LENGTH, "tokens": TOKENS, "parameters": PARAMETERS, "scale": options.scale},
        "draws": options.draws,
        "seeds": list(range(options.models)),
        "reward": "share of neighbours that differ",
        "gaps": {key: sum(each[key] for each in gaps) / len(gaps) for key in gaps[0]},
        "machine": machine(),
        "versions": versions(),
        "processor_seconds": round(time.process_time() - started, 1),
        "results": results,
        "group": GROUP,
        "keyed_by_prompt": shared,
    }
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "estimators.json").write_text(json.dumps(report, indent=2) + "\n")
    text = table(report)
    (options.output / "estimators.md").write_text(text)
    plot(report, options.output / "estimators.png")
    print(text)


# --- what is exact ----------------------------------------------------------------------------------------------------


class Denoiser:
    """Log-probabilities of the tokens of all completions behind all masks, and everything that is exact about them.

    Their conditionals need not fit together, as those of trained models. Everything is a function of `log_probs`
    `[81, 16, 4]`, log p(y_i | what the mask shows of y), and linear in `jacobian` `[81, 64, 204]`, its derivatives.
    """

    def __init__(self, seed: int, scale: float, change: Tensor | None = None) -> None:
        generator = torch.Generator().manual_seed(seed)
        features = 1 + LENGTH * (TOKENS + 1)  # f: a constant, and which token is in which slot
        self.uses = torch.ones(LENGTH, features, 1, dtype=torch.float64)
        for i in range(LENGTH):  # a slot that is predicted is hidden: what it shows is another constant
            self.uses[i, 1 + i * (TOKENS + 1) : 1 + (i + 1) * (TOKENS + 1)] = 0
        self.weight = torch.randn(LENGTH, features, TOKENS, generator=generator, dtype=torch.float64) * scale
        self.weight = self.uses * (self.weight if change is None else self.weight + change)
        canvas = torch.where(MASKS, MASK, COMPLETIONS[:, None])  # [81, 16, 4]
        seen = one_hot(canvas, TOKENS + 1).flatten(2).double()  # [81, 16, 16]
        seen = torch.cat([torch.ones_like(seen[..., :1]), seen], dim=-1)  # [81, 16, f]
        logits = torch.einsum("ymf,ifv->ymiv", seen, self.weight)
        token = one_hot(COMPLETIONS, TOKENS)[:, None].double()  # [81, 1, 4, 3]
        self.log_probs = (logits.log_softmax(-1) * token).sum(-1)
        slope = token - logits.softmax(-1)
        jacobian = torch.einsum("ymiv,ymf,ij->ymijfv", slope, seen, torch.eye(LENGTH, dtype=torch.float64))
        self.jacobian = (jacobian * self.uses).flatten(3).flatten(1, 2)  # [81, 64, 204]
        different = COMPLETIONS[:, 1:] != COMPLETIONS[:, :-1]
        self.reward = different.double().mean(-1)  # [81]

    def likelihood(self, decoding: str, log_probs: Tensor | None = None) -> Tensor:
        """log p `[81]` of the completions of a decoding."""
        if decoding == "one step":
            return self._of_masks(log_probs, [FULL], single=True).squeeze(-1)
        each = self._of_masks(log_probs, ORDERS[decoding])
        return each.logsumexp(-1) - math.log(each.shape[-1])

    def target(self, name: str) -> Tensor:
        """`[81]`, exact."""
        if name == "any-order bound" or name == "block bound":
            return self._of_masks(None, ORDERS[DECODING[name]]).mean(-1)
        return self.likelihood(DECODING[name])

    def _of_masks(self, log_probs: Tensor | None, orders: list[list[int]], single: bool = False) -> Tensor:
        """Sums of log-probabilities `[81, orders]` of writing in each order (or `single`: all slots at once)."""
        log_probs = self.log_probs if log_probs is None else log_probs
        sums = []
        for order in orders:
            hidden = [FULL if single else order[step:] for step in range(LENGTH)]
            mask = [sum(int(PLACES[slot]) for slot in slots) for slots in hidden]
            sums.append(sum(log_probs[:, m, slot] for m, slot in zip(mask, order, strict=True)))
        return torch.stack(sums, dim=-1)

    def policy(self, decoding: str) -> tuple[Tensor, Tensor, Tensor]:
        """Probabilities `[81]`, advantages R - E[R] `[81]` and gradients of log p `[81, 204]` of a decoding."""
        log_probs = self.log_probs.clone().requires_grad_()
        log_p = self.likelihood(decoding, log_probs)
        (slopes,) = torch.autograd.grad(log_p.sum(), log_probs)
        p = log_p.detach().exp()
        assert abs(float(p.sum()) - 1) < 1e-12
        return p, self.reward - (p * self.reward).sum(), torch.einsum("yc,ycw->yw", slopes.flatten(1), self.jacobian)

    def gaps(self) -> dict[str, float]:
        """Mean over completions of each decoding of log p minus each target."""
        return {
            f"{decoding}, {target}": float((log_p.exp() * (log_p - self.target(target))).sum())
            for decoding in DECODING.values()
            for log_p in [self.likelihood(decoding)]
            for target in DECODING
        }


# --- what estimators make of it ---------------------------------------------------------------------------------------


def rows(count: int) -> Rows:
    """Of any completion: what is hidden depends on no token."""
    prompt, canvas = torch.ones(count, 1, dtype=torch.long), torch.zeros(count, LENGTH, dtype=torch.long)
    return Rows(prompt, prompt, canvas, torch.ones_like(canvas), torch.arange(count))


def measure(entry: Entry, model: Denoiser, draws: int, seed: int) -> dict[str, float]:
    """Bias and variance of an estimator, in nats, over the completions of its decoding; gradients are relative."""
    views = entry.estimator.draw(rows(draws), seed=seed, iteration=0)
    mask = (views.hidden[..., 1:] * PLACES).sum(-1)  # [N, K]
    cell = mask[..., None] * LENGTH + torch.arange(LENGTH)  # [N, K, 4], into the 64 of a completion
    p, advantage, slopes = model.policy(DECODING[entry.target])
    target = model.target(entry.target)
    exact = torch.einsum("y,yw->w", p * advantage, slopes)
    bias, error, variance, expected, noise = 0.0, 0.0, 0.0, torch.zeros_like(exact), 0.0
    for y in range(len(COMPLETIONS)):
        log_probs = (model.log_probs[y][mask] * views.scored).requires_grad_()
        scores = entry.estimator.reduce(log_probs, views).sum(-1)  # [N]
        (coefficients,) = torch.autograd.grad(scores.sum(), log_probs)
        scores = scores.detach()
        total = torch.zeros(draws, 4 * len(MASKS), dtype=torch.float64)
        total.scatter_add_(1, cell.flatten(1), (coefficients * views.scored).flatten(1))
        mean = total.mean(0)
        around = total - mean
        products = model.jacobian[y] @ model.jacobian[y].mT  # gradients themselves, [N, 204], would take longer
        bias += float(p[y] * (scores.mean() - target[y]))
        error += float(p[y] * scores.std() / draws**0.5)
        variance += float(p[y] * scores.var())
        expected += p[y] * advantage[y] * (mean @ model.jacobian[y])
        noise += float(p[y] * advantage[y] ** 2 * ((around @ products) * around).sum(-1).mean())
    spread = p * (advantage[:, None] * slopes - exact).square().sum(-1)
    size = exact.norm()
    return {
        "forwards": float(views.hidden.shape[1]),
        "bias": bias,
        "bias_error": error,
        "variance": variance,
        "variance_x_forwards": variance * views.hidden.shape[1],
        "gradient_cosine": float(torch.dot(expected, exact) / (expected.norm() * size)),
        "gradient_scale": float(torch.dot(expected, exact) / size**2),
        "gradient_bias": float((expected - exact).norm() / size),
        "gradient_noise": noise / float(spread.sum()),
        "gradient_noise_x_forwards": noise / float(spread.sum()) * views.hidden.shape[1],
    }


def measure_group(entry: Entry, model: Denoiser, draws: int, seed: int) -> dict[str, float]:
    """What views add to the variance of a group's gradient, mean of A grad S, over that of sampling the group.

    With masks of its own for each completion it is that of one completion. With the same masks M for all, and mean(M)
    the expectation of A grad S over completions, it is more by G - 1 times the variance of mean(M), which is small
    where advantages cancel what M does to all completions alike.
    """
    own = together = spread = 0.0
    for p, advantage, exact, drawn in _of_prompts(entry, model, draws, seed):
        mean = torch.zeros_like(drawn[0])
        for y, gradient in enumerate(drawn):
            own += float(p[y] * advantage[y] ** 2 * gradient.var(0).sum())
            mean += p[y] * advantage[y] * gradient
        together += float(mean.var(0).sum())
        each = advantage[:, None] * exact
        spread += float((p * (each - (p[:, None] * each).sum(0)).square().sum(-1)).sum())
    return {"noise_by_row": own / spread, "noise_by_prompt": (own + (GROUP - 1) * together) / spread}


def _of_prompts(
    entry: Entry, model: Denoiser, draws: int, seed: int
) -> Iterator[tuple[Tensor, Tensor, Tensor, list[Tensor]]]:
    """For each prompt: probabilities, advantages and exact gradients of its completions, and those of each draw."""
    width = PROMPT if isinstance(entry.estimator, MeanField) else 0
    batch = rows(draws)
    if width:
        prompt, canvas = torch.ones(draws, width, dtype=torch.long), torch.zeros(draws, LENGTH - width).long()
        batch = Rows(prompt, prompt, canvas, torch.ones_like(canvas), batch.row_ids)
    views = entry.estimator.draw(batch, seed=seed, iteration=0)
    mask = (views.hidden[..., -LENGTH:] * PLACES).sum(-1)  # [N, K]
    slot = torch.arange(width, LENGTH)
    cell = (mask[..., None] * LENGTH + slot).flatten(1)
    if width:
        everything = int(PLACES[width:].sum())  # the mask of the whole completion, behind a clean prompt
        p = model.log_probs[:, everything, width:].sum(-1).exp()
        slopes = model.jacobian[:, everything * LENGTH + slot].sum(1)
    else:
        p, _, slopes = model.policy(DECODING[entry.target])
    size = TOKENS ** (LENGTH - width)
    for first in range(0, len(COMPLETIONS), size):
        drawn = []
        for y in range(first, first + size):
            log_probs = (model.log_probs[y][mask][..., width:] * views.scored).requires_grad_()
            (coefficients,) = torch.autograd.grad(entry.estimator.reduce(log_probs, views).sum(), log_probs)
            total = torch.zeros(draws, LENGTH * len(MASKS), dtype=torch.float64)
            drawn.append(total.scatter_add_(1, cell, (coefficients * views.scored).flatten(1)) @ model.jacobian[y])
        here = slice(first, first + size)
        yield p[here], model.reward[here] - (p[here] * model.reward[here]).sum(), slopes[here], drawn


# --- showing ----------------------------------------------------------------------------------------------------------


def table(report: Mapping[str, Any]) -> str:
    """Markdown."""
    model = report["model"]
    lines = [
        f"Estimators on {len(report['seeds'])} random denoisers of {model['slots']} slots and {model['tokens']} tokens "
        f"({model['parameters']} parameters, float64), {report['draws']} draws each; seeds {report['seeds']}. Means "
        "over the completions of the decoding that the target belongs to.",
        "",
        "- **target**: the exact quantity that `bias` is the distance from, in nats per sequence. *mean field*: "
        "sum of log p(y_i | nothing), the log-likelihood of decoding in one step. *left-to-right*: the chain of "
        "log p(y_i | y_<i), the log-likelihood of decoding from left to right. *any-order bound*: mean over orders of "
        "the sum of log-probabilities, a lower bound of the log-likelihood of decoding in random order. *block bound*: "
        "the same within blocks of 2 given those before, a bound of block-wise decoding.",
        "- **variance** of the value over draws, and times the forwards spent. `bias` has a standard error from draws. "
        "*Reweighted* estimators (†) do not claim their value: only the direction of their gradient matters. Tokens "
        "that count 1/t where they are hidden with probability t ~ U(0, 1) have infinite variance (‡): what is shown "
        "for them is that of these draws, and so are the standard errors.",
        "- **gradient**: of E[R] under the target's decoding, exact by enumeration, against the mean of "
        "(R - E[R]) x the gradient of the estimate: cosine, scale along it, distance relative to its length. `noise` "
        "is the variance that views add, relative to that of sampling one completion with exact gradients of log p.",
        "",
        "| estimator | settings | target | forwards | bias | variance | x forwards | cosine | scale | distance | noise "
        "| x forwards |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for r in report["results"]:
        mark = " †" * r["reweighted"] + " ‡" * r["infinite_variance"]
        lines.append(
            f"| {r['estimator']}{mark} | {r['settings']} | {r['target']} | {r['forwards']:.0f} "
            f"| {r['bias']:+.3f} ± {r['bias_error']:.3f} | {r['variance']:.3f} | {r['variance_x_forwards']:.3f} "
            f"| {r['gradient_cosine']:.3f} | {r['gradient_scale']:.3f} | {r['gradient_bias']:.3f} "
            f"| {r['gradient_noise']:.3f} | {r['gradient_noise_x_forwards']:.3f} |"
        )
    lines += [
        "",
        "Mean of log p(y) of a decoding minus each target, over completions of that decoding, in nats: what it costs "
        "to take the target for the log-likelihood.",
        "",
        "| completions from | " + " | ".join(DECODING) + " |",
        "|---|" + "---:|" * len(DECODING),
    ]
    for decoding in DECODING.values():
        cells = [f"{report['gaps'][f'{decoding}, {target}']:.3f}" for target in DECODING]
        lines.append(f"| {decoding} | " + " | ".join(cells) + " |")
    lines += [
        "",
        f"Masks of a row's own, or the same for the {report['group']} completions of a prompt (`views_keyed_by`): what "
        "views add to the variance of a group's policy gradient, relative to that of sampling the group with exact "
        "gradients. The mean field has a prompt of two slots here.",
        "",
        "| estimator | settings | noise, keyed by row | keyed by prompt | ratio |",
        "|---|---|---:|---:|---:|",
    ]
    for r in report["keyed_by_prompt"]:
        row, prompt = r["noise_by_row"], r["noise_by_prompt"]
        lines.append(f"| {r['estimator']} | {r['settings']} | {row:.4f} | {prompt:.4f} | {prompt / row:.2f} |")
    about, seconds = report["machine"], report["processor_seconds"]
    about_it = f"{seconds:.0f} s of processor time on {about['cpu']}, {about['threads']} thread(s)"
    lines += ["", f"{about_it}; `{report['command']}`.", ""]
    return "\n".join(lines)


def plot(report: Mapping[str, Any], path: Path) -> None:
    """Variance of values and noise of gradients by forwards; exact estimators have neither and are left out."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    series: dict[str, list[Mapping[str, Any]]] = {}
    for result in report["results"]:
        series.setdefault(f"{result['estimator']} {result['settings']}".strip(), []).append(result)
    series = {name: found for name, found in series.items() if max(r["variance"] for r in found) > 1e-9}
    figure, panels = pyplot.subplots(1, 2, figsize=(13, 6), layout="constrained")
    marks = itertools.cycle("osD^v<>PX*")
    for number, (name, found) in enumerate(series.items()):
        mark = next(marks)
        x = [r["forwards"] for r in found]
        for axes, key in zip(panels, ("variance", "gradient_noise"), strict=True):
            axes.plot(x, [r[key] for r in found], marker=mark, color=f"C{number % 10}", linewidth=1, label=name)
    labels = ("variance of the value, nats squared", "variance that views add to the policy gradient, relative")
    for axes, label in zip(panels, labels, strict=True):
        axes.set(xscale="log", yscale="log", xlabel="forwards per completion", ylabel=label)
        axes.set_xticks([1, 2, 4, 8, 16], ["1", "2", "4", "8", "16"])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", fontsize="x-small")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
