"""``hybridopt demo``: a byte-level GPT on real text, trained bare and wrapped."""
