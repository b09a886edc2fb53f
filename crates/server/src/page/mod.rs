//! The page that is served at `/`: three texts in the binary. Knows nothing of what it shows.

pub(crate) const HTML: &str = include_str!("page.html");
pub(crate) const CSS: &str = include_str!("page.css");
pub(crate) const JS: &str = include_str!("page.js");
