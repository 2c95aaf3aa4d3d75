"""What did the calls do? Observers: the recorder, and who reads it (Prometheus, OTLP, the access log, traces)."""
