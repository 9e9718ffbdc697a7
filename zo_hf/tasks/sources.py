"""The sources of the job's model and sentences: the hub, local files, or the embedded default."""

import urllib.request
from collections.abc import Callable
from dataclasses import dataclass

from accelerate.utils import broadcast_object_list
from huggingface_hub import constants

from zo_hf.tasks.assets import Loaded, default_model, loaded_asset
from zo_hf.tasks.data import LabeledSentences, embedded_reviews, file_sentences, hub_sentences
from zo_hf.tasks.job_arguments import HUB_DATASET, HUB_MODEL, JobArguments

EMBEDDED_MODEL = "SmolLM2-135M-Instruct"
EMBEDDED_SENTENCES = "Rotten Tomatoes sentences"
HUB_TIMEOUT_SECONDS = 5.0


@dataclass(frozen=True)
class Sources:
    """The chosen sources.

    Attributes:
        model: hub name or folder of the model; None means the embedded model.
        dataset: hub name of the data set; None means the embedded sentences, unless the job names files.
        notice: the reason why the embedded default is used, in one line; None if it is not used.
    """

    model: str | None
    dataset: str | None
    notice: str | None


def choose_sources(job: JobArguments) -> Sources:
    """Fill in the sources that the job leaves open, from the hub if it can be reached, else the embedded default."""
    model, dataset = job.model_name_or_path, job.dataset_name
    model_is_open, data_is_open = model is None, dataset is None and job.train_file is None
    if not (model_is_open or data_is_open):
        return Sources(model, dataset, notice=None)
    # One process decides for all, so that a slow network cannot give two processes different models.
    answer = [not job.offline and hub_answers()]
    if broadcast_object_list(answer)[0]:
        return Sources(
            model=HUB_MODEL if model_is_open else model,
            dataset=HUB_DATASET if data_is_open else dataset,
            notice=None,
        )
    embedded = [EMBEDDED_MODEL] * model_is_open + [EMBEDDED_SENTENCES] * data_is_open
    reason = "--offline" if job.offline else f"No answer from the hub at {constants.ENDPOINT}"
    return Sources(model, dataset, notice=f"{reason}: using the embedded {' and '.join(embedded)}.")


def hub_answers() -> bool:
    """Return whether the hub serves the default model within a few seconds; False if HF_HUB_OFFLINE is set."""
    if constants.HF_HUB_OFFLINE:
        return False
    request = urllib.request.Request(f"{constants.ENDPOINT}/{HUB_MODEL}/resolve/main/config.json", method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=HUB_TIMEOUT_SECONDS):
            return True
    except OSError:
        return False


def with_model_path(sources: Sources, load: Callable[[str], Loaded]) -> Loaded:
    """Call `load` with the argument for `from_pretrained`; if the embedded model was chosen, fetch it."""
    if sources.model is not None:
        return load(sources.model)
    return loaded_asset(default_model, lambda path: load(str(path)))


def load_sentences(job: JobArguments, sources: Sources, seed: int) -> LabeledSentences:
    """Load the chosen sentences.

    Raises:
        ValueError: a file, a column or a label does not match the options, or a label has no verbalizer.
    """
    sizes = (job.num_train_examples, job.num_eval_examples, seed)
    columns = (job.text_column, job.label_column)
    if job.train_file is not None:
        sentences = file_sentences(job.train_file, job.validation_file, *sizes, *columns)
    elif sources.dataset is not None:
        sentences = hub_sentences(sources.dataset, job.dataset_config_name, *sizes, *columns)
    else:
        sentences = embedded_reviews(*sizes)
    highest = max(*sentences.train["label"], *sentences.held_out["label"])
    if highest >= len(job.verbalizers):
        raise ValueError(
            f"the sentences have the label {highest}, but --verbalizers has {len(job.verbalizers)} words; give a word for "
            "every label."
        )
    return sentences
