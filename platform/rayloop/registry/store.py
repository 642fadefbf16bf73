"""Versions of a model and the aliases that point to them, kept in MLflow's registry."""

from dataclasses import dataclass
from typing import Any, Literal

from rayloop.clock import Clock, iso_utc
from rayloop.config import RegistryConfig
from rayloop.errors import DataMissing, RequestError
from rayloop.locks import exclusive
from rayloop.registry.release import RECORD_FILE, release_folder
from rayloop.storage import Storage
from rayloop.tracking_client import open_client

Alias = Literal["champion", "challenger", "shadow", "previous"]
CHAMPION: Alias = "champion"
CHALLENGER: Alias = "challenger"
PREVIOUS: Alias = "previous"
SHADOW: Alias = "shadow"
DIGEST_TAG = "artifact_digest"


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelVersion:
    """A registered version.

    Attributes:
        model: Name in the registry.
        version: An integer as text.
        aliases: Names that point to it, sorted.
        artifact_digest: SHA-256 of the model file.
        tags: Accuracy, gate, lineage: what a table shows.
    """

    model: str
    version: str
    aliases: tuple[str, ...]
    artifact_digest: str
    tags: dict[str, str]


class Registry:
    """The registry of one root or server; `open_registry` makes it.

    Args:
        storage: Holds the releases' files.
        client: An `mlflow.MlflowClient`.
        clock: Stamps changes of aliases.
    """

    def __init__(self, storage: Storage, client: Any, clock: Clock) -> None:
        self._storage = storage
        self._client = client
        self._clock = clock

    def resolve(self, model: str, ref: str = "") -> str:
        """The exact version behind a reference.

        Args:
            model: Name in the registry.
            ref: Empty for the champion, `@alias`, `:version` or the bare number.

        Raises:
            DataMissing: Nothing is there.
        """
        if ref and not ref.startswith("@"):
            version = ref.removeprefix(":")
            if not self.is_published(model, version):
                raise self._missing(model, f"version {version!r}")
            return version
        alias = ref.removeprefix("@") or CHAMPION
        version = self.aliases(model).get(alias, "")
        if not version:
            raise self._missing(model, f"alias {alias!r}")
        return version

    def aliases(self, model: str) -> dict[str, str]:
        """Version by alias; empty when the model is unknown."""
        found = self._registered(model)
        return {} if found is None else {name: str(at) for name, at in found.aliases.items()}

    def versions(self, model: str) -> list[ModelVersion]:
        """All versions whose files are in place, oldest first."""
        pointing: dict[str, list[str]] = {}
        for alias, version in self.aliases(model).items():
            pointing.setdefault(version, []).append(alias)
        found = [
            ModelVersion(
                model=model,
                version=str(entry.version),
                aliases=tuple(sorted(pointing.get(str(entry.version), []))),
                artifact_digest=entry.tags.get(DIGEST_TAG, ""),
                tags=dict(entry.tags),
            )
            for entry in self._entries(model)
        ]
        return [entry for entry in found if self.is_published(model, entry.version)]

    def models(self) -> list[str]:
        """Names of all registered models, sorted."""
        return sorted(entry.name for entry in self._client.search_registered_models())

    def reserve(self, model: str, artifact_digest: str, source: str, run_id: str) -> str:
        """The version of an artifact: the one that holds it already, else a new number.

        A number whose files were never published (the registering process died) is used again for
        the same artifact, and is not listed until then.

        Args:
            model: Name in the registry; made when it is new.
            artifact_digest: SHA-256 of the model file.
            source: Path or URI the artifact comes from.
            run_id: MLflow's run id of the training run; may be empty.

        Raises:
            RequestError: Files of that number lie there and the database does not know them.
        """
        with exclusive(self._storage, "registry"):
            if self._registered(model) is None:
                self._client.create_registered_model(model)
            for entry in self._entries(model):
                if entry.tags.get(DIGEST_TAG) == artifact_digest:
                    return str(entry.version)
            tags = {DIGEST_TAG: artifact_digest}
            made = self._client.create_model_version(
                model, source=source, run_id=run_id or None, tags=tags
            )
            version = str(made.version)
            if self.is_published(model, version):
                self._client.delete_model_version(model, version)
                raise RequestError(
                    f"{self._storage.path(release_folder(model, version))} holds a release that "
                    "the registry's database does not know; the database was removed or replaced. "
                    "Restore mlflow.db, or move that folder away."
                )
        return version

    def is_published(self, model: str, version: str) -> bool:
        """Whether a version's files are in place."""
        return version.isdigit() and self._storage.exists(
            f"{release_folder(model, version)}/{RECORD_FILE}"
        )

    def tag(self, model: str, version: str, tags: dict[str, str]) -> None:
        """Attach short texts to a version."""
        for name, value in tags.items():
            self._client.set_model_version_tag(model, version, name, value)

    def move_alias(self, model: str, alias: Alias, version: str) -> None:
        """Point an alias at a version; a champion that is replaced becomes `previous`.

        `previous` moves first, so that at no moment the model is without a champion.

        Raises:
            DataMissing: There is no such version.
        """
        with exclusive(self._storage, "registry"):
            self._move(model, alias, version)

    def promote(self, model: str, version: str = "") -> str:
        """Make the challenger champion and the champion `previous`; returns the new champion.

        Args:
            model: Name in the registry.
            version: What the challenger was when this was decided; a challenger that has changed
                since stays challenger. Empty means whatever it is now.

        Raises:
            DataMissing: There is no challenger.
        """
        with exclusive(self._storage, "registry"):
            challenger = self.resolve(model, f"@{CHALLENGER}")
            self._move(model, CHAMPION, version or challenger)
            if version in ("", challenger):
                self._client.delete_registered_model_alias(model, CHALLENGER)
        return version or challenger

    def remove_alias(self, model: str, alias: Alias) -> None:
        """Let an alias point nowhere; nothing happens when it does already."""
        with exclusive(self._storage, "registry"):
            if alias in self.aliases(model):
                self._client.delete_registered_model_alias(model, alias)

    def rollback(self, model: str) -> str:
        """Make the previous champion champion again; returns its version.

        The version that is rolled back keeps no alias, so a second rollback cannot bring it back.

        Raises:
            DataMissing: There is no previous champion.
        """
        with exclusive(self._storage, "registry"):
            version = self.resolve(model, f"@{PREVIOUS}")
            bad = self.aliases(model).get(CHAMPION, "")
            self._client.set_registered_model_alias(model, CHAMPION, version)
            self._client.delete_registered_model_alias(model, PREVIOUS)
            if bad:
                self.tag(model, bad, {"rolled_back_at": iso_utc(self._clock.now())})
        return version

    def _move(self, model: str, alias: Alias, version: str) -> None:
        if not self.is_published(model, version):
            raise self._missing(model, f"version {version!r}")
        current = self.aliases(model).get(alias, "")
        if current == version:
            return
        if alias == CHAMPION and current:
            self._client.set_registered_model_alias(model, PREVIOUS, current)
        self._client.set_registered_model_alias(model, alias, version)
        self.tag(model, version, {f"{alias}_at": iso_utc(self._clock.now())})

    def _registered(self, model: str) -> Any:
        """MLflow's entry of a model; None when there is none."""
        found = self._client.search_registered_models(filter_string=f"name = '{model}'")
        return found[0] if found else None

    def _entries(self, model: str) -> list[Any]:
        found = self._client.search_model_versions(f"name = '{model}'")
        return sorted(found, key=lambda entry: int(entry.version))

    def _missing(self, model: str, what: str) -> DataMissing:
        aliases = ", ".join(f"@{name} -> {at}" for name, at in self.aliases(model).items())
        numbers = ", ".join(entry.version for entry in self.versions(model))
        return DataMissing(
            f"Model {model!r} has no {what}; it has versions {numbers or 'none'} and aliases "
            f"{aliases or 'none'}. Register one: python jobs/register.py PRESET"
        )


def open_registry(storage: Storage, config: RegistryConfig, clock: Clock) -> Registry:
    """The registry of a root, its database set up if it is new.

    Args:
        storage: The root everything lives under.
        config: Names the server or database.
        clock: Stamps changes.
    """
    return Registry(storage, open_client(storage, config.tracking_uri), clock)
