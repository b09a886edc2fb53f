//! The page in a real browser: it draws, it marks the fault, a click and the keyboard show a cell's statistics, and it asks
//! nothing of a network.

mod chromium;
mod sample;

use std::fs;
use std::path::{Path, PathBuf};

use chromium::Chromium;
use parity::Scenario;
use report::{Source, View, page};
use sample::{Fault, report};

/// A page on the disk, removed at the end.
struct Page(PathBuf);

impl Page {
    fn of(name: &str, view: &View) -> Page {
        let path = scratch().join(format!("{name}-{}.html", std::process::id()));
        fs::write(&path, page(view)).expect("the tests' directory can be written");
        Page(path)
    }
}

impl Drop for Page {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

fn view(layers: usize, fault: Fault) -> View {
    View::of(&report(layers, fault), Path::new("a directory"))
}

fn scratch() -> &'static Path {
    Path::new(env!("CARGO_TARGET_TMPDIR"))
}

#[test]
fn the_page_in_a_browser() {
    let Some(program) = chromium::found() else { return };
    let mut chromium = Chromium::start(&program, scratch(), [1400, 1100]);
    let cells_of_layer = 3 + 3 + 1 + 1 + 4 + 3 + 2;
    let cases = [
        (48, Fault::Story, Some(("blk.6.experts_down.down", "NaN right"))),
        (48, Fault::Off(11), Some(("blk.11.attn_out.x", "diverge"))),
        (2, Fault::Off(0), Some(("blk.0.attn_out.x", "diverge"))),
        (2, Fault::None, None),
    ];
    for (i, (layers, fault, marked)) in cases.into_iter().enumerate() {
        let page = Page::of(&format!("case-{i}"), &view(layers, fault));
        chromium.open(&page.0, "");
        assert_eq!(chromium.complaints(), [""; 0], "{layers} {fault:?}");
        let count = |chromium: &mut Chromium, selector: &str| {
            chromium.value(&format!("document.querySelectorAll({selector:?}).length")).as_u64()
        };
        assert_eq!(count(&mut chromium, "#grid .c"), Some(layers as u64 * cells_of_layer + 2), "{layers}");
        assert_eq!(count(&mut chromium, "#grid .t"), Some(layers as u64 * 7), "types of {layers}");
        let first = chromium
            .value("[...document.querySelectorAll('#grid .c.first')].map((c) => c.dataset.cell).join()");
        let text = chromium.value("document.querySelector('#cell').innerText");
        let text = text.as_str().expect("text");
        match marked {
            // What is marked is shown at once.
            Some((key, status)) => {
                assert_eq!(first, key, "{layers} {fault:?}");
                assert!(text.contains(status) && text.contains("the first"), "{fault:?}: {text}");
            }
            None => {
                assert_eq!(first, "");
                assert!(text.contains("all equal"), "{text}");
            }
        }
        let nan = count(&mut chromium, "#grid .c.nan");
        assert_eq!(nan > Some(0), fault == Fault::Story, "{fault:?}: {nan:?}");
        // Layers stand one below the other, stages side by side, and a cell is large enough to be hit.
        let box_of =
            |key: &str| format!("document.querySelector(\"[data-cell='{key}']\").getBoundingClientRect()");
        let (q, k, below) = (box_of("blk.0.qkv.q"), box_of("blk.0.qkv.k"), box_of("blk.1.qkv.q"));
        for claim in [
            format!("{q}.top === {k}.top && {k}.left - {q}.right < 4 && {k}.left > {q}.right - 1"),
            format!("{below}.left === {q}.left && {below}.top >= {q}.bottom"),
            format!("{q}.width >= 20 && {q}.height >= 14"),
        ] {
            assert_eq!(chromium.value(&claim), true, "{layers}: {claim}");
        }
        // Nothing is cut off: the page itself never scrolls sideways.
        let wide = chromium.value("document.documentElement.scrollWidth - innerWidth");
        assert!(wide.as_i64().is_some_and(|wide| wide <= 0), "{layers}: {wide} pixels too wide");
    }
}

#[test]
fn a_click_and_the_keyboard() {
    let Some(program) = chromium::found() else { return };
    let mut chromium = Chromium::start(&program, scratch(), [1300, 900]);
    let page = Page::of("keys", &view(48, Fault::Story));
    chromium.open(&page.0, "");
    let shown = |chromium: &mut Chromium| {
        let value = chromium.value("document.querySelector('#grid [aria-selected=true]').dataset.cell");
        value.as_str().expect("a cell is chosen").to_owned()
    };
    let panel = |chromium: &mut Chromium| {
        let value = chromium.value("document.querySelector('#cell').innerText");
        value.as_str().expect("text").to_owned()
    };
    chromium.click("#grid [data-cell='blk.6.experts_down.x']");
    assert_eq!(shown(&mut chromium), "blk.6.experts_down.x");
    let text = panel(&mut chromium);
    for part in [
        "layer 6 · experts_down · x",
        "NaN right",
        "l_out-6",
        "ffn_down_exps Q4_K",
        "(first at ",
        "undefined",
    ] {
        assert!(text.contains(part), "{part:?} is not in {text}");
    }
    let plots = "[...document.querySelectorAll('#cell [data-plot]')].map((f) => f.dataset.plot).join()";
    assert_eq!(chromium.value(plots), "values,ulps");
    let lit = "[...document.querySelectorAll('.lit')].map((t) => t.dataset.type).join()";
    assert_eq!(chromium.value(lit), "6.ffn_down_exps");
    let routing = "document.querySelector('#routing').innerText";
    assert!(chromium.value(routing).as_str().is_some_and(|text| text.contains("0 of 3 rows")), "layer 6");

    let steps = [
        ("ArrowUp", "blk.5.experts_down.x"),
        ("ArrowLeft", "blk.5.experts_down.down"),
        ("Home", "blk.5.qkv.q"),
        ("PageDown", "blk.13.qkv.q"),
        ("End", "blk.13.experts_down.x"),
        ("ArrowRight", "blk.13.experts_down.x"),
        ("PageUp", "blk.5.experts_down.x"),
        ("PageUp", "embed.x"),
        ("ArrowDown", "blk.0.experts_down.x"),
        ("f", "blk.6.experts_down.down"),
    ];
    for (key, want) in steps {
        chromium.press(key);
        assert_eq!(shown(&mut chromium), want, "after {key}");
        assert_eq!(chromium.value("document.activeElement.dataset.cell"), want, "the focus after {key}");
    }
    // One stop for the Tab key, and a name for every cell.
    assert_eq!(chromium.value("document.querySelectorAll('#grid [tabindex=\"0\"]').length"), 1);
    assert_eq!(chromium.value("document.querySelectorAll('#grid .c:not([aria-label])').length"), 0);
    // A link to a cell.
    chromium.call("Page.navigate", serde_json::json!({ "url": "about:blank" }));
    chromium.open(&page.0, "#blk.7.route.experts");
    assert_eq!(shown(&mut chromium), "blk.7.route.experts");
    assert!(chromium.value(routing).as_str().is_some_and(|text| text.contains("3 of 3 rows")), "layer 7");
    assert_eq!(chromium.complaints(), [""; 0]);
}

/// Traces have one side: those of transformers, which another package's tests hold a model against.
#[test]
fn traces() {
    let Some(program) = chromium::found() else { return };
    let mut chromium = Chromium::start(&program, scratch(), [1000, 900]);
    for (name, cells, experts) in [("moe-top2-norm", 3 * 17 + 2, true), ("dense-tied", 3 * 13 + 2, false)] {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tally/tests/data/dumps").join(name);
        let Source::Trace(dump) = Source::open(&dir).expect("it is there") else { panic!("not a bisection") };
        let page = Page::of(name, &View::of_trace(&dump, &dir).expect("it can be read"));
        chromium.open(&page.0, "#blk.1.attend.attn");
        assert_eq!(chromium.complaints(), [""; 0], "{name}");
        assert_eq!(chromium.value("document.querySelectorAll('#grid .c').length"), cells, "{name}");
        assert_eq!(chromium.value("document.querySelectorAll('#grid .c.first').length"), 0, "{name}");
        let text = chromium.value("document.querySelector('#cell').innerText");
        let text = text.as_str().expect("text");
        assert!(text.contains("layer 1 · attend · attn") && text.contains("rms"), "{name}: {text}");
        assert!(!text.contains("Left"), "{name}: {text}");
        let routing = chromium.value("!document.querySelector('#routing').hidden");
        assert_eq!(routing, experts, "{name}");
    }
}

#[test]
fn runs_and_steps_are_chosen() {
    let Some(program) = chromium::found() else { return };
    let mut chromium = Chromium::start(&program, scratch(), [1200, 900]);
    let report = sample::report_of(2, Fault::Off(1), &[Scenario::Decode]);
    let page = Page::of("runs", &View::of(&report, Path::new("runs")));
    chromium.open(&page.0, "");
    let choose = |chromium: &mut Chromium, name: &str, index: usize| {
        chromium.value(&format!(
            "(() => {{ const s = document.querySelector('select[aria-label=\"{name}\"]'); s.selectedIndex = {index}; \
             s.dispatchEvent(new Event('change')); return s.options.length }})()"
        ))
    };
    let tokens = "document.querySelectorAll('#routing tbody tr').length";
    chromium.click("#grid [data-cell='blk.0.route.experts']");
    let first = chromium.value(tokens);
    // Three tokens, the last two of them one at a time.
    assert_eq!(choose(&mut chromium, "step", 1), 3);
    chromium.click("#grid [data-cell='blk.0.route.experts']");
    assert_eq!((first, chromium.value(tokens)), (1.into(), 1.into()));
    let fill = "document.querySelector('[data-cell=\"blk.1.attn_out.x\"]').style.getPropertyValue('--fill')";
    let by_nmse = chromium.value(fill);
    choose(&mut chromium, "colour by", 0);
    assert_ne!(chromium.value(fill), by_nmse, "another measure has another colour");
    assert_eq!(chromium.complaints(), [""; 0]);
}

#[test]
fn a_page_that_fails_is_noticed() {
    let Some(program) = chromium::found() else { return };
    let mut chromium = Chromium::start(&program, scratch(), [400, 300]);
    let broken = Page(scratch().join(format!("broken-{}.html", std::process::id())));
    let script = "document.body.dataset.ready = 'true'; fetch('http://127.0.0.1:9/x').catch(() => {}); throw Error('no')";
    fs::write(&broken.0, format!("<body><script>{script}</script>")).expect("writable");
    chromium.open(&broken.0, "");
    let complaints = chromium.complaints().join("\n");
    assert!(
        complaints.contains("Error: no") && complaints.contains("asked for http://127.0.0.1:9/x"),
        "{complaints}"
    );
}

/// Pictures to look at, in light and dark; `just screenshots` puts two of them into docs/.
#[test]
#[ignore = "writes pictures and checks nothing"]
fn pictures() {
    let Some(program) = chromium::found() else { return };
    let cases = [
        ("story", 48, Fault::Story),
        ("off", 48, Fault::Off(11)),
        ("two", 2, Fault::Off(0)),
        ("equal", 2, Fault::None),
    ];
    for (name, layers, fault) in cases {
        let mut chromium = Chromium::start(&program, scratch(), [1300, 1140]);
        let page = Page::of(name, &view(layers, fault));
        for scheme in ["light", "dark"] {
            chromium.scheme(scheme);
            chromium.open(&page.0, "");
            let path = scratch().join(format!("{name}-{scheme}.png.base64"));
            fs::write(&path, chromium.screenshot()).expect("writable");
            println!("{}", path.display());
        }
    }
}
