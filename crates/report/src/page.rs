//! The page: the view as JSON inside one HTML file that asks nothing of a network, and runs nothing but its own script.

use std::fmt::Write as _;

use crate::view::{Tone, View};

const TEMPLATE: &str = include_str!("../assets/page.html");
const STYLE: &str = include_str!("../assets/page.css");
const SCRIPT: &str = include_str!("../assets/page.js");

/// The whole file. The verdict stands in the text itself, for readers without scripts.
pub fn page(view: &View) -> String {
    let title = format!("{} · tally", view.headline);
    let data = serde_json::to_string(view).expect("a view is numbers, text and lists");
    let tone = match view.tone {
        Tone::Agree => "agree",
        Tone::Diverge => "diverge",
        Tone::NonFinite => "non_finite",
        Tone::Trace => "trace",
    };
    let parts: [(&str, &str); 7] = [
        ("title", &escaped(&title)),
        ("headline", &escaped(&view.headline)),
        ("verdict", &coded(&view.verdict)),
        ("tone", tone),
        ("style", STYLE),
        ("data", &in_script(&data)),
        ("script", SCRIPT),
    ];
    fill(TEMPLATE, &parts)
}

/// Puts each part in the place of its `{{name}}`, in one pass: what a part contains is never looked at.
fn fill(template: &str, parts: &[(&str, &str)]) -> String {
    let mut out = String::new();
    let mut rest = template;
    while let Some((before, after)) = rest.split_once("{{") {
        let (name, after) = after.split_once("}}").expect("the template closes what it opens");
        let part = parts.iter().find(|(of, _)| *of == name).expect("the template names only what there is");
        out.push_str(before);
        out.push_str(part.1);
        rest = after;
    }
    out + rest
}

/// Text for an HTML element or attribute.
fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            c => out.push(c),
        }
    }
    out
}

/// Text in which `` `names` `` are set as code.
fn coded(text: &str) -> String {
    let mut out = String::new();
    for (i, part) in text.split('`').enumerate() {
        // Writing to a string cannot fail.
        let _ = match i % 2 {
            0 => write!(out, "{}", escaped(part)),
            _ => write!(out, "<code>{}</code>", escaped(part)),
        };
    }
    out
}

/// JSON that no text in it can end early: `</script>` and `<!--` are spelled so that they are none.
fn in_script(json: &str) -> String {
    json.replace('<', "\\u003c")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_put_in_once() {
        let check = |template, want: &str| assert_eq!(fill(template, &[("a", "{{b}}"), ("b", "B")]), want);
        check("", "");
        check("x{{b}}y{{a}}{{b}}", "xBy{{b}}B");
    }

    #[test]
    fn hostile_text_is_only_text() {
        assert_eq!(escaped("<a href='\"&"), "&lt;a href=&#39;&quot;&amp;");
        assert_eq!(coded("a `b<c` d"), "a <code>b&lt;c</code> d");
        let json = serde_json::json!({ "name": "</script><!-- x" });
        let text = in_script(&json.to_string());
        assert!(!text.contains('<'), "{text}");
        assert_eq!(serde_json::from_str::<serde_json::Value>(&text).expect("still JSON"), json);
    }
}
