"""The numbers that the paper reports (Zhang, Choshen and Andreas, arXiv 2506.20989).

Llama 3.2 1B, accuracy in %, standard errors within ±2. As summarised publicly; check against the
paper before quoting. None stands where no number is known to us. Figure 2 prints no numbers; what
is known of its bars is from the tables.
"""

from __future__ import annotations

SQUAD, WIKITEXT = "squad", "wikitext"

Numbers = dict[str, float | None]

# Figure 2: by task, model and setting. No Context is Table 5's; Fine-Tuning is Table 1's, whose
# meta-training is on gold responses.
FIGURE2: dict[str, dict[str, Numbers]] = {
    SQUAD: {
        "BM": {"no_context": 35.2, "prompt": 87.7, "fine_tuning": 47.3},
        "LG": {"fine_tuning": 58.6},
    },
    WIKITEXT: {"BM": {"fine_tuning": 29.1}, "LG": {"fine_tuning": 37.2}},
}

# Table 1: accuracy after Fine-Tuning, by task and by how the model was trained.
TABLE1: dict[str, Numbers] = {
    SQUAD: {"none": 47.3, "full": 58.6, "lora": 59.4, "lora-inner": 72.0, "untrained-lora": 45.1},
    WIKITEXT: {
        "none": 29.1,
        "full": 37.2,
        "lora": 37.5,
        "lora-inner": 38.3,
        "untrained-lora": 32.2,
    },
}

# Table 2, SQuAD: accuracy after Fine-Tuning, by number of contexts, one after another; the
# meta-training is on gold responses.
TABLE2_BASE: dict[int, float | None] = {1: 47.3, 4: 43.6, 16: 42.6}
TABLE2_SINGLE: dict[int, float | None] = {1: 57.2}
TABLE2_MULTIPLE: dict[int, float | None] = {4: 51.5, 16: 46.6}

# Table 3: accuracy after Fine-Tuning, by task and training: none at all, on the task itself, on
# WikiText and then (sequential) or also (joint) SQuAD in the ordinary way.
TABLE3: dict[str, Numbers] = {
    SQUAD: {"none": 47.3, "in-domain": 58.6, "sequential": 47.8, "joint": 48.0},
    WIKITEXT: {"none": 29.1, "in-domain": 37.2, "sequential": 34.8, "joint": 34.8},
}

# Table 4, SQuAD: the share of examples in each class, by split.
TABLE4: dict[str, Numbers] = {
    "test": {"always incorrect": 55.6, "correct without context": 3.6, "only with context": 12.8},
    "train": {"correct without context": 5.8, "only with context": 34.7},
}

# Table 5: accuracy after Fine-Tuning on the right and on an irrelevant context, and of No Context.
TABLE5: dict[str, Numbers] = {
    SQUAD: {"right": 58.6, "irrelevant": 29.7, "no_context": 35.2},
    WIKITEXT: {"right": 37.2, "irrelevant": 0.01},
}
