"""What the documentation's site needs besides its pages: the API reference, files of the repository, embedded replays.

mkdocs calls the functions that start with `on_` (`hooks` in mkdocs.yml). Owns which modules are in the API reference,
and what becomes of a link that leads out of `docs/`: on GitHub it opens the file, in the site a copy of it, so that the
site is whole wherever it is put. Nothing here imports mkdocs unless mkdocs calls it, so that tests can read the tables.
"""

from __future__ import annotations

import posixpath
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
COPIES = "repository"  # folder of the site that has the copies

API: dict[str, list[str]] = {
    "Training": [
        "rl4dlm.training.trainer",
        "rl4dlm.training.trajectory",
        "rl4dlm.training.trajectory_settings",
        "rl4dlm.training.self_distillation",
        "rl4dlm.training.interventions.intervention",
        "rl4dlm.training.interventions.inpainting",
        "rl4dlm.training.credit.credit",
        "rl4dlm.training.credit.daca",
        "rl4dlm.training.credit.dispo",
    ],
    "Supervised training": [
        "rl4dlm.sft.trainer",
        "rl4dlm.sft.config",
        "rl4dlm.sft.causal_attention",
        "rl4dlm.sft.adapt",
        "rl4dlm.sft.cut",
    ],
    "Models": [
        "rl4dlm.models.spec",
        "rl4dlm.models.loading",
        "rl4dlm.models.convert",
        "rl4dlm.models.adapters",
        "rl4dlm.models.scoring",
        "rl4dlm.models.family",
        "rl4dlm.models.tiny",
    ],
    "Rollouts": [
        "rl4dlm.rollout.decoding",
        "rl4dlm.rollout.engine",
        "rl4dlm.rollout.rollout",
        "rl4dlm.rollout.state",
        "rl4dlm.rollout.audit",
        "rl4dlm.rollout.backends.backend",
        "rl4dlm.rollout.backends.in_process",
        "rl4dlm.rollout.backends.http",
    ],
    "Schedules, caches, constraints": [
        "rl4dlm.rollout.schedules.registry",
        "rl4dlm.rollout.schedules.parts",
        "rl4dlm.rollout.caches",
        "rl4dlm.rollout.caches.policy",
        "rl4dlm.rollout.constraints.automata",
        "rl4dlm.rollout.constraints.schema",
    ],
    "Likelihood": [
        "rl4dlm.likelihood.views",
        "rl4dlm.likelihood.estimator",
        "rl4dlm.likelihood.mean_field",
        "rl4dlm.likelihood.elbo",
        "rl4dlm.likelihood.blockwise",
        "rl4dlm.likelihood.quadrature",
        "rl4dlm.likelihood.coupled",
        "rl4dlm.likelihood.complementary",
        "rl4dlm.likelihood.iid",
        "rl4dlm.likelihood.strata",
        "rl4dlm.likelihood.flat_pairs",
        "rl4dlm.likelihood.student_states",
        "rl4dlm.likelihood.left_to_right",
        "rl4dlm.likelihood.steps",
        "rl4dlm.likelihood.step_selectors",
        "rl4dlm.likelihood.uniform",
        "rl4dlm.likelihood.scoring",
    ],
    "Tasks and rewards": [
        "rl4dlm.tasks",
        "rl4dlm.tasks.base",
        "rl4dlm.tasks.prompts",
        "rl4dlm.grading.plugins",
        "rl4dlm.grading.pool",
        "rl4dlm.grading.code.problem",
    ],
    "Evaluation": [
        "rl4dlm.evaluation.measure",
        "rl4dlm.evaluation.results",
        "rl4dlm.evaluation.compare",
        "rl4dlm.evaluation.speed",
        "rl4dlm.evaluation.pass_at",
        "rl4dlm.evaluation.rewards",
        "rl4dlm.evaluation.likelihood",
        "rl4dlm.evaluation.harness",
    ],
    "Replays": ["rl4dlm.tracking.replay", "rl4dlm.tracking.page"],
}
"""Page of the API reference -> modules on it; each algorithm has a page of its own beside them."""

_LINK = re.compile(r"(?<=\]\()(?!https?://|mailto:|#)(?P<path>[^)#\s]+)(?P<anchor>#[^)\s]*)?(?=\))")
_CODE = re.compile(r"^```.*?^```$|`[^`\n]+`", re.M | re.S)
_LANGUAGES = {".py": "python", ".yaml": "yaml", ".sh": "bash", ".json": "json", ".toml": "toml"}
_PICTURES = {".png", ".svg", ".html"}


def algorithms() -> dict[str, list[str]]:
    """Module of an algorithm -> the public names that it has."""
    found: dict[str, list[str]] = {}
    for name, module in _public().items():
        if module.startswith("rl4dlm.algorithms."):
            found.setdefault(module, []).append(name)
    return dict(sorted(found.items()))


def missing() -> list[str]:
    """Public names of `rl4dlm` that no page of the API reference has."""
    modules = {module for group in API.values() for module in group} | set(algorithms())
    # The package's module only hands these on.
    modules |= {"rl4dlm.evaluation", "rl4dlm.grading"}
    return sorted(name for name, module in _public().items() if module not in modules)


def _public() -> dict[str, str]:
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    import rl4dlm

    return dict(rl4dlm._MODULE_OF)


def api_pages() -> Iterator[tuple[str, str, str]]:
    """(path in the site, title, Markdown) of every page of the API reference."""
    yield "api/index.md", "Names", _names()
    for title, modules in API.items():
        text = "\n\n".join(f"::: {module}" for module in modules)
        yield f"api/{_slug(title)}.md", title, f"# {title}\n\n{text}\n"
    for module, names in algorithms().items():
        title = next(name for name in names if name.endswith("Trainer")).removesuffix("Trainer")
        yield f"api/algorithms/{module.rpartition('.')[2]}.md", title, f"# {title}\n\n::: {module}\n"


def _names() -> str:
    """What `from rl4dlm import ...` offers, each with the page that has it."""
    lines = ["# API reference", "", "What `from rl4dlm import ...` offers, and the module that defines it:", ""]
    lines += ["| name | module |", "| --- | --- |"]
    pages = {module: f"{_slug(title)}.md" for title, modules in API.items() for module in modules}
    pages |= {module: f"algorithms/{module.rpartition('.')[2]}.md" for module in algorithms()}
    pages |= {"rl4dlm.evaluation": "evaluation.md", "rl4dlm.grading": "tasks-and-rewards.md"}
    for name, module in sorted(_public().items(), key=lambda item: item[0].lower()):
        lines.append(f"| [`{name}`]({pages[module]}) | `{module}` |")
    return "\n".join(lines) + "\n"


def _slug(title: str) -> str:
    return re.sub(r"[^a-z]+", "-", title.lower()).strip("-")


def outside(text: str, folder: str) -> dict[str, str]:
    """Link as written -> path in the repository, of links in a document that lead out of `docs/`.

    Args:
        text: Markdown. folder: the document's folder in the repository, `"docs"` or `""`.
    """
    found = {}
    for match in _LINK.finditer(_CODE.sub("", text)):
        path = posixpath.normpath(posixpath.join(folder, match["path"]))
        if posixpath.normpath(folder) != "docs" or not path.startswith("docs/"):
            found[match["path"]] = path
    return found


def copies() -> dict[str, Path]:
    """Path in the site -> file of the repository, for all that pages link to outside of `docs/`, and they in turn."""
    found: dict[str, Path] = {}
    todo = [("docs", page) for page in sorted(DOCS.glob("*.md"))]
    while todo:
        folder, page = todo.pop()
        for path in outside(page.read_text(encoding="utf-8"), folder).values():
            target = _address(path)
            if path.startswith("docs/") or target in found or not (ROOT / path).is_file():
                continue
            found[target] = ROOT / path
            if path.endswith(".md"):
                todo.append((posixpath.dirname(path), ROOT / path))
    return found


def _address(path: str) -> str:
    """Where a file of the repository is in the site; text that is no Markdown gets a page around it."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    suffix = posixpath.splitext(path)[1]
    return f"{COPIES}/{path}" if suffix in {".md", *_PICTURES} else f"{COPIES}/{path}.md"


def within_site(text: str, source: str) -> str:
    """A document's Markdown with links that hold in the site. `source` is the document's path in the repository."""
    folder = posixpath.dirname(source)
    here = posixpath.dirname(_address(source))
    links = outside(text, folder)

    def moved(match: re.Match[str]) -> str:
        if match["path"] not in links:
            return match[0]
        return posixpath.relpath(_address(links[match["path"]]), here or ".") + (match["anchor"] or "")

    parts, last = [], 0
    for code in _CODE.finditer(text):
        # Code is left as it is, but for what GitHub's tables need: mkdocs' show the backslash.
        inline = not code[0].startswith("```")
        parts += [_LINK.sub(moved, text[last : code.start()]), code[0].replace("\\|", "|") if inline else code[0]]
        last = code.end()
    return "".join([*parts, _LINK.sub(moved, text[last:])])


def with_frames(text: str) -> str:
    """The gallery, with each replay that a list names below its line."""
    frame = '\n\n    <iframe src="{0}" title="{1}" loading="lazy" class="replay"></iframe>\n'
    return re.sub(
        r"^- \[(?P<title>[^\]]+)\]\((?P<path>[^)]+\.html)\).*?(?=\n- |\n\n|\Z)",
        lambda m: m[0] + frame.format(m["path"], m["title"]),
        text,
        flags=re.M | re.S,
    )


def on_config(config: Any) -> Any:
    """Adds the API reference to the navigation."""
    pages = {path: title for path, title, _ in api_pages()}
    single = [{title: path} for path, title in pages.items() if not path.startswith("api/algorithms/")]
    of_algorithms = [{title: path} for path, title in pages.items() if path.startswith("api/algorithms/")]
    config["nav"].append({"API reference": [*single, {"Algorithms": of_algorithms}]})
    return config


def on_files(files: Any, config: Any) -> Any:
    """Adds the API reference's pages, and copies of the files that pages link to."""
    from mkdocs.structure.files import File

    for path, _, text in api_pages():
        files.append(File.generated(config, path, content=text))
    for target, source in copies().items():
        suffix = source.suffix
        if suffix in _PICTURES:
            files.append(File.generated(config, target, content=source.read_bytes()))
            continue
        text, path = source.read_text(encoding="utf-8"), source.relative_to(ROOT).as_posix()
        if suffix != ".md":
            text = f"# {path}\n\n````{_LANGUAGES.get(suffix, 'text')}\n{text}````\n"
        else:
            text = within_site(text, path)
        files.append(File.generated(config, target, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Turns links out of `docs/` into links to the copies; the gallery's replays are shown in place."""
    if page.file.src_uri == "gallery.md":
        markdown = with_frames(markdown)
    if page.file.generated_by:
        return markdown
    return within_site(markdown, f"docs/{page.file.src_uri}")
