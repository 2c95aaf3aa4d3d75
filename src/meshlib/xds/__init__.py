"""The wire, shared by both planes: xDS v3 messages, what they mean, and the state machine of a client's stream."""
