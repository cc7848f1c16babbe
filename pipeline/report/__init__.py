"""Pages to look at: one run, several runs or a sweep as HTML, and what `doctor` finds before anything is computed."""
