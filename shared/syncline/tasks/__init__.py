"""Ready-made tasks, and what a task is (`base`). Importing this package imports no torch."""

DEFAULT_ALLOWED = ("syncline.tasks.*",)  # patterns of the tasks that an agent runs without being told
