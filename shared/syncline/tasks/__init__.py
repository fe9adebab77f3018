"""Ready-made tasks and the base class of tasks. Importing the package imports no torch."""

DEFAULT_ALLOWED = ("syncline.tasks.*",)  # patterns of the tasks that an agent runs by default
