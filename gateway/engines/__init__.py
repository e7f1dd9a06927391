"""The engine seam: the protocol, the real engine, the process that holds it, and a stand-in for tests."""
