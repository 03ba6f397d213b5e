"""How cast-floats decides what half types can hold."""
