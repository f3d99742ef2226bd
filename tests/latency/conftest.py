from tests.latency.clock import clock

__all__ = ["clock"]
