//! What a model is: configuration, weights, stages, and the one forward.
