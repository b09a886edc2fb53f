//! Seeded random-weight models: the same bytes on every machine.
