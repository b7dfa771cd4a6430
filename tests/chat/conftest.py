"""Hypothesis for the chat tests: no deadlines (the machine is shared), the same examples on every run."""

from hypothesis import HealthCheck, settings

settings.register_profile(
    "chat",
    deadline=None,
    derandomize=True,
    max_examples=50,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
settings.load_profile("chat")
