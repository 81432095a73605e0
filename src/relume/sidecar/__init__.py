"""The HTTP endpoint that an instance sees at 169.254.169.253:8234."""

from relume.sidecar.server import ADDRESS, PORT, Answer, Limits, Sidecar

__all__ = ["ADDRESS", "PORT", "Answer", "Limits", "Sidecar"]
