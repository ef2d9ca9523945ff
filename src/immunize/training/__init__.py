"""The training engine. Raise the version when a change of it, of generation or of batches changes results."""

ENGINE_VERSION = 1
