"""jaxnet: a functional neural-net library for JAX in which the learning rate is derived, not guessed."""
