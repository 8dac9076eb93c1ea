"""How a pipeline goes to a directory or the Hugging Face hub, and comes back."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

from huggingface_hub import ModelCard, ModelHubMixin

from driftar.pretrained import (
    MODEL_CARD_TEMPLATE,
    PipelineParts,
    locate,
    read_parts,
    replacing,
    write_parts,
)

__all__ = ["PretrainedPipeline"]


class PretrainedPipeline(
    ModelHubMixin,
    library_name="driftar",
    tags=["image-generation"],
    paper_url="https://arxiv.org/abs/2603.28049",
    model_card_template=MODEL_CARD_TEMPLATE,
):
    """The hub's mixin over verified files. A subclass is built from the fields of
    ``PipelineParts`` and returns them from ``_parts``.
    """

    def _parts(self) -> PipelineParts:
        raise NotImplementedError

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Path | str,
        *,
        force_download: bool = False,
        token: str | bool | None = None,
        cache_dir: Path | str | None = None,
        local_files_only: bool = False,
        revision: str | None = None,
        **replacements: Any,
    ) -> Self:
        """The pipeline in a directory, or in the hub repository "owner/name".

        A directory that training left (``runs/a/drift_ar/model``) gives a pipeline around its
        model. Nothing is downloaded for a directory.

        Args:
            pretrained_model_name_or_path: directory or hub id.
            force_download, token, cache_dir, local_files_only, revision: as in
                ``huggingface_hub.snapshot_download``.
            replacements: ``vae``, ``tokenizer``, ``latent_scale`` or ``latent_shift`` in place of
                what is stored.

        Raises:
            ValueError: neither a directory nor a hub id.
            CheckpointError: damaged, incomplete or foreign files.
            ImportError: a part needs a package that is not installed; names the extra.
        """
        # Not the mixin's, which reads config.json before any file is verified.
        directory = locate(
            pretrained_model_name_or_path,
            force_download=force_download,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            revision=revision,
        )
        return cls(**(vars(read_parts(directory)) | replacements))

    def save_pretrained(
        self,
        save_directory: Path | str,
        *,
        config: Any = None,
        repo_id: str | None = None,
        push_to_hub: bool = False,
        model_card_kwargs: dict[str, Any] | None = None,
        **push_to_hub_kwargs: Any,
    ) -> str | None:
        """Write the pipeline and a model card to a directory, all or nothing.

        Args:
            save_directory: where to; a model card (README.md) that is there stays.
            repo_id, push_to_hub, push_to_hub_kwargs: upload it as well, see ``push_to_hub``;
                `repo_id` is the directory's name by default.
            config, model_card_kwargs: of ``huggingface_hub.ModelHubMixin``.

        Returns:
            The address of the commit with ``push_to_hub=True``.

        Raises:
            TypeError: a part that cannot be stored.
            CheckpointError: the disk refuses.
        """
        directory = Path(save_directory)
        repo_id = repo_id or directory.name
        card = {"repo_id": repo_id} | (model_card_kwargs or {})
        # The mixin begins by removing the old config.json: let it, in a directory of its own.
        with replacing(directory) as staging:
            super().save_pretrained(staging, config=config, model_card_kwargs=card)
        if not push_to_hub:
            return None
        return self.push_to_hub(
            repo_id, config=config, model_card_kwargs=card, **push_to_hub_kwargs
        )

    def push_to_hub(
        self, repo_id: str, *, model_card_kwargs: dict[str, Any] | None = None, **options: Any
    ) -> str:
        """Upload the pipeline with a model card, and return the address of the commit.

        Args:
            repo_id: "owner/name"; created if it does not exist.
            model_card_kwargs: what the model card shall say instead (``repo_id``, ``name``).
            options: ``private``, ``token``, ``commit_message``, ``branch``, ``create_pr`` and the
                others of ``huggingface_hub.ModelHubMixin.push_to_hub``.

        Raises:
            TypeError: a part that cannot be stored. The hub's own errors pass.
        """
        card = {"repo_id": repo_id} | (model_card_kwargs or {})
        return super().push_to_hub(repo_id, model_card_kwargs=card, **options)

    def _save_pretrained(self, save_directory: Path) -> None:
        write_parts(save_directory, self._parts())

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """The model card: `kwargs` fill in its template."""
        parts = self._parts()
        card = super().generate_model_card(*args, **({"name": parts.model.name} | kwargs))
        task = "unconditional-image-generation" if parts.tokenizer is None else "text-to-image"
        card.data["pipeline_tag"] = task
        return card
