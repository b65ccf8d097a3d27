"""Profiles: how large an experiment is, as data.

`methods/profiles/<chapter>.yaml` maps profile -> experiment -> section.
"""

from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from synthrepro import paths
from synthrepro.errors import UserError
from synthrepro.evidence.experiments import load_chapter

PROFILES = ("smoke", "cpu", "gpu", "paper")


def load_profile(chapter: str, profile: str) -> dict[str, BaseModel]:
    """Experiment name -> configuration, in the order of the chapter's `EXPERIMENTS`.

    Raises:
        UserError: unknown chapter or profile; a section that is missing or belongs to no experiment; a key that is
            missing, unknown or of the wrong type. The sentence names file, profile, experiment and key.
    """
    experiments = load_chapter(chapter)
    if profile not in PROFILES:
        raise UserError(f"There is no profile {profile!r}; the profiles are {', '.join(PROFILES)}.")
    where = f"{_shown(_path(chapter))}, profile {profile!r}"
    sections = read_profiles(chapter).get(profile)
    if sections is None:
        raise UserError(f"{where}: the profile is missing; add it, with a section for each experiment.")
    for name in [*experiments, *sections]:
        if name not in sections:
            raise UserError(f"{where}: experiment {name!r} has no section; add one.")
        if name not in experiments:
            raise UserError(f"{where}: there is no experiment {name!r}; the chapter has {', '.join(experiments)}.")
    configs = {}
    for name, experiment in experiments.items():
        if experiment.config.model_config.get("extra") != "forbid":
            raise TypeError(f"{experiment.config.__name__} must forbid unknown keys: derive it from evidence.Config")
        try:
            configs[name] = experiment.config.model_validate(sections[name])
        except ValidationError as error:
            problems = "; ".join(_sentence(problem, experiment.config) for problem in error.errors())
            raise UserError(f"{where}, experiment {name!r}: {problems}.") from None
    return configs


def read_profiles(chapter: str) -> dict[str, dict[str, Any]]:
    """Profile -> experiment -> section, as the file has them, not validated.

    Raises:
        UserError: the file is missing, no YAML, or has another form.
    """
    path = _path(chapter)
    if not path.exists():
        raise UserError(f"{_shown(path)} is missing; a chapter needs it, with the profiles {', '.join(PROFILES)}.")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise UserError(f"{_shown(path)} is no valid YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(content, dict) or not all(isinstance(sections, dict) for sections in content.values()):
        raise UserError(f"{_shown(path)} must map each profile to the sections of its experiments.")
    for profile in content:
        if profile not in PROFILES:
            raise UserError(f"{_shown(path)}: there is no profile {profile!r}; the profiles are {', '.join(PROFILES)}.")
    return content


def _path(chapter: str) -> Path:
    return paths.PACKAGE / "methods" / "profiles" / f"{chapter}.yaml"


def _sentence(problem: Any, config: type[BaseModel]) -> str:
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "missing":
        return f"key {key!r} is missing"
    if problem["type"] == "extra_forbidden":
        known = f" (known: {', '.join(config.model_fields)})" if len(problem["loc"]) == 1 else ""
        return f"key {key!r} is unknown{known}"
    where = f"key {key!r}: " if key else ""
    return f"{where}{problem['msg'].rstrip('.')}, not {problem['input']!r}"


def _shown(path: Path) -> str:
    return str(path.relative_to(paths.ROOT) if path.is_relative_to(paths.ROOT) else path)
