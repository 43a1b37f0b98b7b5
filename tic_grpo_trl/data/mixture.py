"""Read the data sets that TRL's key `datasets` lists."""

from typing import Any

from trl import DatasetMixtureConfig, get_dataset

from .sources import quiet, reason_of


def read_mixture(mixture: DatasetMixtureConfig, seed: int) -> dict[str, Any]:
    """Read a mixture as TRL does: the split `train`, and `test` if `test_split_size` is set.

    The random split depends on `seed` alone, so that every process and a resumed run have the same one.

    Raises:
        ValueError: if one of the data sets cannot be read, or they have different columns.
    """
    if mixture.streaming and mixture.test_split_size is not None:
        raise ValueError("test_split_size does not work with streaming: give --eval_dataset_name instead.")
    whole = DatasetMixtureConfig(mixture.datasets, mixture.streaming)
    try:
        with quiet():
            loaded = get_dataset(whole)
            if mixture.test_split_size is not None:
                loaded = loaded["train"].train_test_split(mixture.test_split_size, seed=seed)
    except Exception as error:  # each format fails in its own way
        paths = ", ".join(one.path for one in mixture.datasets)
        raise ValueError(
            f"datasets: {paths} cannot be read ({reason_of(error)}). The keys are those of TRL; for a file, give "
            "path: json and data_files: my.jsonl."
        ) from error
    return dict(loaded)
