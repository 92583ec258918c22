"""Restricted view of the settings: a stage can read only those it declares, so that its cache key covers its inputs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar, cast

from pydantic import BaseModel

from mmphi.config.fields import canonical
from mmphi.config.section import Section

S = TypeVar("S", bound=Section)


class UndeclaredError(RuntimeError):
    """A stage reads a setting that it does not declare; a bug in the stage, not in the settings."""


def covered(name: str, declared: Iterable[str]) -> bool:
    """Return whether a dotted name, or a section that contains it, is declared."""
    plain = canonical(name)
    return any(plain == each or plain.startswith(f"{each}.") for each in declared)


class SettingsView:
    """Gives access to declared settings by section class: ``settings(VisionSettings).pool``.

    Args:
        settings: All settings of an experiment.
        declared: Dotted names that may be read; a name includes all below it, and list items are written ``N``.
    """

    def __init__(self, settings: Section, declared: Iterable[str]) -> None:
        self._settings, self.declared = settings, tuple(declared)

    def __call__(self, section: type[S]) -> S:
        """Return a section of which only the declared settings can be read.

        Raises:
            UndeclaredError: If the settings have no such section, or none of it is declared.
        """
        for name, field in type(self._settings).model_fields.items():
            if field.annotation is section:
                return cast(S, self._of(name, getattr(self._settings, name)))
        raise UndeclaredError(f"{section.__name__} is no section of {type(self._settings).__name__}")

    def _of(self, name: str, value: Any) -> Any:
        if covered(name, self.declared):
            return value
        if not any(each.startswith(f"{canonical(name)}.") for each in self.declared):
            raise UndeclaredError(f"{name} is read, but not declared")
        if isinstance(value, list):
            return [self._of(f"{name}.{i}", item) for i, item in enumerate(value)]
        return _SectionView(self, name, value)


class _SectionView:
    """One section; reading an undeclared setting raises :class:`UndeclaredError`."""

    def __init__(self, view: SettingsView, name: str, section: BaseModel) -> None:
        self._view, self._name, self._section = view, name, section

    def __getattr__(self, attribute: str) -> Any:
        if attribute.startswith("_") or attribute not in type(self._section).model_fields:
            raise AttributeError(attribute)
        return self._view._of(f"{self._name}.{attribute}", getattr(self._section, attribute))
