from tests.measure.latency.clock import clock

__all__ = ["clock"]
