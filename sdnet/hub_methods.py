"""The methods of a network that store it on the Hugging Face Hub and read it from there; `sdnet.hub` does the work."""

from os import PathLike
from typing import TYPE_CHECKING, Any, cast

from sdnet.files import checked_path

if TYPE_CHECKING:
    from sdnet.models import SDNet


class HubMethods:
    """`save_pretrained`, `push_to_hub` and `from_pretrained`, which import huggingface_hub when they are called."""

    def save_pretrained(
        self,
        save_directory: str | PathLike[str],
        *,
        run: str | PathLike[str] | None = None,
        dataset: str | None = None,
        note: str | None = None,
        license: str | None = None,
        repo_id: str | None = None,
        push_to_hub: bool = False,
        **push_to_hub_kwargs: Any,
    ) -> str | None:
        """Write the network to a folder in the layout of the Hugging Face Hub: config.json, model.safetensors, a card.

        Needs the package huggingface_hub, whose mixin does this.

        Args:
            save_directory: the folder; it is made if needed. A card that it has is kept, with a warning.
            run: the run folder of the training that made these weights. The card then has its scores, recipe, device,
                versions and commit, and a note if CIFAR was read from JPEG files.
            dataset: the name of the data that the scores belong to.
            note: a sentence for the card, for instance on how the data were prepared.
            license: the licence of the weights, as the hub abbreviates it. None is "mit".
            repo_id: with `push_to_hub`, the repository, "user/name"; None is the name of the folder.
            push_to_hub: whether to upload the folder too.
            **push_to_hub_kwargs: other arguments of `push_to_hub`.

        Returns:
            The address of the commit on the hub with `push_to_hub`, else None.

        Raises:
            ImportError: huggingface_hub or safetensors is not installed.
            ValueError: the network cannot be built from arguments, because it was changed by other means than
                `sdnet.set_lambda` and the options of its layers, or `run` has not made these weights.

        Example:
            >>> model = sdnet.load_model("runs/demo")
            >>> model.save_pretrained("hub/demo", run="runs/demo", dataset="photographs of scikit-image")
        """
        from sdnet import hub

        folder = checked_path(save_directory, "save_directory", "a folder")
        facts = hub.facts_of(cast("SDNet", self), run, dataset, note, license)
        return hub.adapter()(self).save_pretrained(
            folder, repo_id=repo_id, push_to_hub=push_to_hub, model_card_kwargs=facts, **push_to_hub_kwargs
        )

    def push_to_hub(
        self,
        repo_id: str,
        *,
        run: str | PathLike[str] | None = None,
        dataset: str | None = None,
        note: str | None = None,
        license: str | None = None,
        **options: Any,
    ) -> str:
        """Upload the network to the Hugging Face Hub, in the layout of `save_pretrained`.

        Args:
            repo_id: the repository, "user/name"; it is made if needed.
            run: see `save_pretrained`.
            dataset: see `save_pretrained`.
            note: see `save_pretrained`.
            license: see `save_pretrained`.
            **options: options of huggingface_hub: commit_message, private, token, branch, create_pr, allow_patterns,
                ignore_patterns, delete_patterns.

        Returns:
            The address of the commit.

        Raises:
            ImportError: huggingface_hub or safetensors is not installed.
            ValueError: see `save_pretrained`.
        """
        from sdnet import hub

        facts = hub.facts_of(cast("SDNet", self), run, dataset, note, license)
        return hub.adapter()(self).push_to_hub(repo_id, model_card_kwargs=facts, **options)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | PathLike[str],
        *,
        force_download: bool = False,
        token: str | bool | None = None,
        cache_dir: str | PathLike[str] | None = None,
        local_files_only: bool = False,
        revision: str | None = None,
        **changes: Any,
    ) -> "SDNet":
        """Build the network of a folder of `save_pretrained`, or of a repository of the Hugging Face Hub.

        Args:
            pretrained_model_name_or_path: the folder, or the repository, "user/name".
            force_download: whether to download files that are in the cache again.
            token: the token of the hub; None is that of the login.
            cache_dir: the folder of downloaded files.
            local_files_only: whether to use downloaded files only.
            revision: a branch, tag or commit of the repository.
            **changes: arguments of `create_model` that replace those of the file, such as `lam` or `impl`.

        Returns:
            The network in evaluation mode, on the CPU.

        Raises:
            ImportError: huggingface_hub or safetensors is not installed.
            FileNotFoundError: there is no such folder, or no model.safetensors.
            ValueError: the name has a wrong type, the files are damaged, or config.json does not belong to the weights.
            TypeError: `changes` has an argument that `create_model` does not have.

        Example:
            >>> model = sdnet.SDNet.from_pretrained("hub/demo", lam=0.3)
        """
        from sdnet import hub

        return hub.load_pretrained(
            pretrained_model_name_or_path,
            changes,
            force_download=force_download,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            revision=revision,
        )
