"""The algorithms that the reports on bias and on learning compare: those of the papers, and ours that followed them."""

COMPARED = (
    "tic_grpo",
    "tic_grpo_released",
    "tic_grpo_capped",
    "tic_grpo_truncated",
    "tic_grpo_v2",
    "grpo",
    "grpo2",
    "grpo_traj_is",
    "gspo",
    "grpo_no_is",
)
