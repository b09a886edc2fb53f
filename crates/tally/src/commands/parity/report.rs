//! What a comparison found, for people as it comes and for programs at the end, and the verdict. Compares nothing.

use std::fmt::Write as _;
use std::time::Duration;

use parity::report::RunFacts;
use parity::{Apart, Comparison, Difference, Finiteness};
use serde_json::{Value, json};

use super::Step;
use crate::compared;
use crate::device::Facts;
use crate::failure::Failure;
use crate::live::Live;
use crate::output;
use crate::prompted::Prompted;

/// For whom it is printed.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Format {
    Text,
    Json,
}

/// Steps as they come, and what they amount to.
pub(super) struct Report {
    format: Format,
    head: Value,
    names: [String; 2],
    /// Every stage of the prompt, if it was asked for.
    layers: Option<RunFacts>,
    steps: Vec<Step>,
}

/// Who is compared, on which model: printed for people, returned for programs.
pub(super) fn head(
    format: Format,
    prompted: &Prompted,
    sides: [(Live, &Facts); 2],
) -> Result<Value, Failure> {
    let (model, activations) = (&prompted.name, prompted.activations().name());
    if format == Format::Text {
        output::line(format_args!("model  {}, activations {activations}", output::printable(model)))?;
        for (place, (device, facts)) in ["left", "right"].into_iter().zip(sides) {
            output::line(format_args!("{place:<5}  {device} ({facts})"))?;
        }
    }
    let side =
        |(device, facts): (Live, &Facts)| json!({ "device": device.to_string(), "facts": facts.json() });
    let [left, right] = sides.map(side);
    Ok(json!({ "model": model, "activations": activations, "left": left, "right": right }))
}

impl Report {
    /// Says what is compared, and shows the stages.
    pub(super) fn begin(
        format: Format,
        prompted: &Prompted,
        sides: [(Live, &Facts); 2],
        layers: Option<RunFacts>,
    ) -> Result<Report, Failure> {
        let names = sides.map(|(device, _)| device.to_string());
        let mut head = head(format, prompted, sides)?;
        head["prompt_ids"] = prompted.ids.clone().into();
        if let Some(run) = &layers {
            head["layers"] = serde_json::to_value(run).expect("names, numbers and lists are JSON");
            if format == Format::Text {
                let first = run.first_divergence.or(run.first_non_finite).map(|at| &run.cells[at]);
                let figures = first.map_or(String::new(), |cell| format!("\n{}", compared::figures(cell)));
                output::line(format_args!("\n{}{figures}", compared::layers(run)))?;
            }
        }
        Ok(Report { format, head, names, layers, steps: Vec::new() })
    }

    /// Takes a step, prints it, and returns the left's likeliest token with its logit.
    pub(super) fn step(&mut self, step: Step) -> Result<Option<(u32, f32)>, Failure> {
        let top = step.tops[0];
        if self.format == Format::Text {
            self.print(&step)?;
        }
        self.steps.push(step);
        Ok(top)
    }

    fn print(&self, step: &Step) -> Result<(), Failure> {
        let Comparison { left, right, .. } = step.comparison;
        let place = self.place(self.steps.len(), step);
        // A generated token that agrees is one line.
        if step.token.is_some() && step.comparison.bits_equal() && step.comparison.finite() {
            let [left, right] = step.times.map(seconds);
            return output::line(format_args!("{place}: bits equal; {left}, {right}"));
        }
        let mut text = format!("\n{place}\n");
        for (i, finiteness) in [left, right].into_iter().enumerate() {
            let top = step.tops[i].map_or("none".into(), |(id, logit)| format!("{id} ({logit})"));
            let time = seconds(step.times[i]);
            let name = &self.names[i];
            // Writing to a string cannot fail.
            let _ = writeln!(text, "  {name:<10}  {}", finiteness);
            let _ = writeln!(text, "  {:<10}  {time}, top-1 {top}", "");
        }
        text.push_str(&distances(&step.comparison));
        output::line(format_args!("{}", text.trim_end()))
    }

    /// Prints what is left to print; the verdict is the result.
    pub(super) fn finish(self) -> Result<(), Failure> {
        if self.format == Format::Json {
            output::json(&self.json())?;
        }
        let verdict = self.verdict();
        if verdict.is_ok() && self.format == Format::Text {
            let (steps, total) =
                (self.steps.len(), self.steps.iter().map(|s| s.comparison.left.total).sum::<usize>());
            let plural = if steps == 1 { "" } else { "s" };
            let total = output::grouped(total as u64); // `usize` is at most 64 bits wide
            output::line(format_args!("\nall bits agree: {total} logits of {steps} step{plural}"))?;
        }
        verdict
    }

    fn verdict(&self) -> Result<(), Failure> {
        let [left, right] = &self.names;
        let place = |i: usize| self.place(i, &self.steps[i]);
        if let Some(i) = self.steps.iter().position(|step| !step.comparison.finite()) {
            let Comparison { left: l, right: r, .. } = self.steps[i].comparison;
            let bad = |counts: &Finiteness| counts.total - counts.finite;
            let message = format!(
                "{}: {} of {} logits of {left} and {} of {right} are no numbers",
                place(i),
                bad(&l),
                l.total,
                bad(&r)
            );
            return Err(Failure::numeric(message));
        }
        let Some(i) = self.steps.iter().position(|step| !step.comparison.bits_equal()) else {
            return self.stages_agree();
        };
        let Comparison { differing, left: Finiteness { total, .. }, .. } = self.steps[i].comparison;
        let message =
            format!("{}: {differing} of {total} logits differ between {left} and {right}", place(i));
        Err(Failure::mismatch(message))
    }

    /// Logits can agree where a stage does not.
    fn stages_agree(&self) -> Result<(), Failure> {
        let first = self.layers.as_ref().and_then(|run| Some(&run.cells[run.first_divergence?]));
        match first {
            Some(cell) => Err(Failure::mismatch(format!("{}: the first difference", cell.place))),
            None => Ok(()),
        }
    }

    fn place(&self, index: usize, step: &Step) -> String {
        match step.token {
            None => "prompt".into(),
            Some(token) => format!("generated {index} (token {token})"),
        }
    }

    /// Everything; times in seconds, divergence in nats.
    fn json(&self) -> Value {
        let mut value = self.head.clone();
        value["steps"] = self.steps.iter().map(step_json).collect();
        let failed = |of: fn(&Comparison) -> bool| self.steps.iter().any(|step| !of(&step.comparison));
        value["verdict"] = match (failed(Comparison::finite), failed(Comparison::bits_equal)) {
            (true, _) => "non-finite",
            (_, true) => "mismatch",
            _ => "equal",
        }
        .into();
        value
    }
}

/// Whether bits agree and, if not, how far apart the two are.
fn distances(c: &Comparison) -> String {
    let Some(Difference { index, left, right }) = c.first else { return "  bits        equal".into() };
    let mut lines = vec![(
        "bits",
        format!(
            "{} of {} differ, the first at {index}: {left} ({:08x}) and {right} ({:08x})",
            c.differing,
            c.left.total,
            left.to_bits(),
            right.to_bits()
        ),
    )];
    let undefined = || "undefined".to_owned();
    match c.apart {
        Some(Apart { cosine, nmse, kl }) => {
            lines.push(("cosine", cosine.map_or_else(undefined, |v| format!("{v:.12}"))));
            lines.push(("NMSE", nmse.map_or_else(undefined, |v| format!("{v:.3e}"))));
            lines.push(("KL", format!("{kl:.3e} nats")));
        }
        None => lines.push(("cosine", "undefined, as NMSE and KL are: not every logit is a number".into())),
    }
    if let Some((Difference { index, left, right }, abs)) = c.max_abs {
        lines.push(("max abs", format!("{abs:.3e} at {index}: {left} and {right}")));
    }
    if let Some((Difference { index, left, right }, ulps)) = c.max_ulps {
        lines.push(("max ULP", format!("{ulps} at {index}: {left} and {right}")));
    }
    lines.into_iter().map(|(what, value)| format!("  {what:<10}  {value}\n")).collect()
}

fn seconds(time: Duration) -> String {
    format!("{:.4} s", time.as_secs_f64())
}

fn step_json(step: &Step) -> Value {
    let c = &step.comparison;
    let side = |i: usize, f: &Finiteness| {
        json!({
            "total": f.total, "finite": f.finite, "nan": f.nan, "nan_first": f.nan_first, "inf": f.inf,
            "inf_first": f.inf_first, "finite_min": f.finite_min.map(|v| v.0), "finite_max": f.finite_max.map(|v| v.0),
            "seconds": step.times[i].as_secs_f64(),
            "top": step.tops[i].map(|(id, logit)| json!({ "id": id, "logit": logit })),
        })
    };
    // JSON has no NaN: the bits say which value it was.
    let place = |d: &Difference| {
        let bits = |v: f32| format!("{:08x}", v.to_bits());
        json!({
            "index": d.index, "left": d.left, "right": d.right, "left_bits": bits(d.left), "right_bits": bits(d.right),
        })
    };
    json!({
        "token": step.token, "left": side(0, &c.left), "right": side(1, &c.right),
        "bits_equal": c.bits_equal(), "differing": c.differing, "first": c.first.as_ref().map(place),
        "cosine": c.apart.and_then(|a| a.cosine), "nmse": c.apart.and_then(|a| a.nmse), "kl": c.apart.map(|a| a.kl),
        "max_abs": c.max_abs.map(|(at, value)| json!({ "value": value, "at": place(&at) })),
        "max_ulps": c.max_ulps.map(|(at, value)| json!({ "value": value, "at": place(&at) })),
    })
}
