"""Which tasks lm-eval knows, and those of a folder of one's own: looked up, named by content, loaded."""

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from functools import lru_cache
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from immunize.stages import hash_file, hash_folder

LIBRARY = "lm_eval"
MOST_NAMED = 3


def installed() -> str:
    """The library's version."""
    return metadata.version(LIBRARY)


def check(names: Sequence[str], path: str | None) -> None:
    """Raise ValueError where the library, a task, or the data of a task of one's own are missing."""
    if find_spec(LIBRARY) is None:
        raise ValueError(f"tasks={list(names)}: needs lm-eval; pip install 'immunize[benchmarks]' brings it")
    if path is not None and not Path(path).is_dir():
        raise ValueError(f"path={path}: no such folder; give one that holds task files of lm-eval")
    known = manager(path).all_tasks
    for name in names:
        if name in known:
            continue
        if path is not None:
            raise ValueError(
                f"tasks={name}: no task of {path}, which has {', '.join(known) or 'none'}; shipped tasks need a "
                "benchmark without path"
            )
        near = get_close_matches(name, known, n=MOST_NAMED)
        hint = f" (did you mean {', '.join(near)}?)" if near else ""
        raise ValueError(f"tasks={name}: no task of lm-eval {installed()}{hint}; `lm-eval ls tasks` lists all")
    if path is not None:
        content(names, path)


def manager(path: str | None) -> Any:
    """The library's index of tasks: its own, which take 8 s to read, or those of a folder."""
    if path is None:
        return _shipped()
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=path, include_defaults=False)


@lru_cache(maxsize=1)
def _shipped() -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager()


def content(names: Sequence[str], path: str) -> dict[str, Any]:
    """What determines tasks of one's own: their settings with the hashes of their data, and the folder's code."""
    members = {name: _members(name, manager(path).task_index) for name in names}
    tasks = {leaf: _settings(leaf, path, run=False) for leaves in members.values() for leaf in leaves}
    settings = {leaf: _without_places(found, path) for leaf, found in tasks.items()}
    return {"members": members, "tasks": settings, "code": hash_folder(Path(path), suffixes=(".py",))}


def loaded(name: str, path: str | None, *, cache: str) -> dict[str, Any]:
    """The library's task objects behind one name, by their own names; `cache` holds local data while they are read."""
    if path is None:
        found = _shipped().load([name])
    else:
        files = manager(path)
        members = [_settings(leaf, path, run=True) for leaf in _members(name, files.task_index)]
        for settings in members:
            # The library's own cache is known to give old rows for a file that has changed.
            settings["dataset_kwargs"] = {**settings.get("dataset_kwargs", {}), "cache_dir": cache}
        found = files.load(members)
    tasks: dict[str, Any] = found["tasks"]
    return tasks


def _members(name: str, index: Mapping[str, Any]) -> list[str]:
    """The tasks behind the name of a task, a tag or a group."""
    if name not in index:
        raise ValueError(f"tasks={name}: a group of the folder names it, and no task file there does")
    match index[name].kind.name:
        case "TAG":
            return sorted(index[name].tags)
        case "GROUP":
            items = index[name].cfg["task"]
            if not all(isinstance(item, str) for item in items):
                raise ValueError(f"tasks={name}: a group of one's own lists names of tasks, and nothing else")
            return [leaf for item in items for leaf in _members(item, index)]
    return [name]


def _settings(name: str, path: str, *, run: bool) -> dict[str, Any]:
    """A task file with what it includes, its data files in their places; with `run`, its functions are imported."""
    from lm_eval.tasks._yaml_loader import load_yaml

    file = Path(manager(path).task_index[name].yaml_path)
    settings: dict[str, Any] = load_yaml(file, resolve_func=run)
    options = settings.get("dataset_kwargs") or {}
    if "data_files" in options:
        placed = _placed(options["data_files"], file.parent, name)
        settings["dataset_kwargs"] = {**options, "data_files": placed}
    return settings


def _placed(found: Any, folder: Path, name: str) -> Any:
    if isinstance(found, Mapping):
        return {key: _placed(item, folder, name) for key, item in found.items()}
    if isinstance(found, list):
        return [_placed(item, folder, name) for item in found]
    place = folder / str(found)
    if not place.is_file():
        raise ValueError(f"tasks={name}: its data_files name {found}, and there is no such file beside its task file")
    return str(place.resolve())


def _without_places(found: Any, path: str) -> Any:
    """Data files as their hashes, functions by their names."""
    if isinstance(found, Mapping):
        return {
            str(key): _hashes(item) if key == "data_files" else _without_places(item, path)
            for key, item in found.items()
        }
    if isinstance(found, list):
        return [_without_places(item, path) for item in found]
    if isinstance(found, str):
        import lm_eval.tasks

        for folder in (Path(path).resolve(), Path(lm_eval.tasks.__file__).parent):
            found = found.replace(f"{folder}/", "")
    return found


def _hashes(found: Any) -> Any:
    if isinstance(found, Mapping):
        return {str(key): _hashes(item) for key, item in found.items()}
    return [_hashes(item) for item in found] if isinstance(found, list) else hash_file(Path(found))
