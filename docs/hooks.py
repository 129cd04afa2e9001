"""What mkdocs does beside its own work: files outside docs/, notebooks as pages, and equations that
need no script.

Notebooks are converted here because mkdocs-jupyter takes only those inside docs/ and fetches
MathJax, and nbconvert's Markdown has code without its language and animations as text in the page.
"""

import base64
import json
import os.path
import re
from html import unescape
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
OUTSIDE = "repository"  # where the site has what lies outside docs/
_LINK = re.compile(r"(\]\()([^)\s#:]+)((?:#[^)\s]*)?\))")
_FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
_CODE = re.compile(r"<code>.*?</code>", re.DOTALL)
_OPTION = re.compile(r"(?<=[\s>])--[a-z][\w.-]*")
_FETCHED = re.compile(r'<(?:script|link|img|iframe)\b[^>]*\b(?:src|href)="?(https?:[^"\s>]+)')
_DATA = re.compile(r'src="data:image/(\w+);base64,([^"]+)"')
_MATH = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def _linked(path: str) -> list[str]:
    """The files that a page links to, as paths from the root of the repository."""
    text = _FENCED.sub("", (ROOT / path).read_text())
    found = [os.path.normpath(f"{os.path.dirname(path)}/{t}") for _, t, _ in _LINK.findall(text)]
    return [str(Path(target)) for target in found]


def _site(path: str) -> str:
    """Where the site has a file of the repository."""
    path = re.sub(r"\.ipynb$", ".md", path)
    inside = path.removeprefix("docs/")
    return inside if inside != path else f"{OUTSIDE}/{path}"


def _notebook(path: str, config: Any) -> list[File]:
    """A notebook as a page, and its pictures."""
    text, pictures, folder = list[str](), list[File](), os.path.dirname(_site(path))
    for cell in json.loads((ROOT / path).read_text())["cells"]:
        source, said = "".join(cell["source"]), ""
        text.append(f"```python\n{source}\n```" if cell["cell_type"] == "code" else source)
        drawn = list[str]()
        for output in cell.get("outputs", ()):
            data = {kind: "".join(lines) for kind, lines in output.get("data", {}).items()}
            html = _DATA.search(data.get("text/html", ""))
            kind, content = html.groups() if html else ("png", data.get("image/png", ""))
            if content:
                name = f"{Path(path).stem}_{len(pictures)}.{kind}"
                raw = base64.b64decode(content)
                pictures.append(File.generated(config, f"{folder}/{name}", content=raw))
                drawn.append(f"![What the cell above shows]({name})")
            else:
                said += "".join(output.get("text", ())) + data.get("text/plain", "")
        text += [f"```{{.text .printed}}\n{said.rstrip()}\n```"] if said.strip() else []
        text += drawn
    return [File.generated(config, _site(path), content="\n\n".join(text)), *pictures]


def on_files(files: Files, config: Any) -> Files:
    """Adds what the documents link to outside docs/: pages, pictures, sources."""
    todo = [str(page.relative_to(ROOT)) for page in ROOT.glob("docs/**/*.md")]
    seen = set(todo)
    while todo:
        for path in _linked(todo.pop()):
            file = (ROOT / path).resolve()
            if path in seen or path.startswith("docs/") or not file.is_file():
                continue
            seen.add(path)
            whole = [File.generated(config, _site(path), abs_src_path=str(file))]
            for part in _notebook(path, config) if path.endswith(".ipynb") else whole:
                files.append(part)
            todo += [path] if path.endswith((".md", ".ipynb")) else []
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Points links to where the site has their files, and takes marks of the tests off fences."""
    here = page.file.src_uri
    outside = here.startswith(f"{OUTSIDE}/")
    path = here.removeprefix(f"{OUTSIDE}/") if outside else f"docs/{here}"

    def moved(link: re.Match) -> str:
        target = os.path.normpath(f"{os.path.dirname(path)}/{link[2]}".lstrip("/"))
        return link[1] + os.path.relpath(_site(target), os.path.dirname(here) or ".") + link[3]

    return re.sub(r"^```(\w+) .*$", r"```\1", _LINK.sub(moved, markdown), flags=re.MULTILINE)


def on_page_content(html: str, **_: Any) -> str:
    """Makes MathML, which browsers draw themselves, of the equations between $$ or $; options of
    commands are not broken behind their dashes.
    """

    def equation(found: re.Match) -> str:
        display = "block" if found[1] == "div" else "inline"
        drawn = convert(unescape(found[2]), display=display)
        return f'<{found[1]} class="equation">{drawn}</{found[1]}>'

    def unbroken(found: re.Match) -> str:
        return _OPTION.sub(lambda option: f'<span class="option">{option[0]}</span>', found[0])

    return _CODE.sub(unbroken, _MATH.sub(equation, html))


def on_post_page(output: str, page: Any, **_: Any) -> None:
    """Refuses a page that a reader without a network cannot read."""
    if found := _FETCHED.search(output):
        raise PluginError(f"{page.file.src_uri}: fetches {found[1]}; expected a file of the site")
