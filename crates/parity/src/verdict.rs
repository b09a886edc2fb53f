//! A report in words: the decision tree's reading, and the verdict in two sentences. Computes nothing.

use model::{Buffer, Stage};

use crate::report::{Cell, Class, Finding, Location, Outcome, Report, RunFacts, Status, TensorPlace};

/// What the tree of questions says: is it finite, where does it start, what was still right before.
pub(crate) fn reading(report: &Report) -> Vec<String> {
    let mut lines = Vec::new();
    let Some(run) = report.runs.last() else { return lines };
    if let Some(at) = run.first_non_finite {
        lines.push(non_finite(run, &run.cells[at]));
    }
    if let Some(at) = run.first_divergence {
        lines.extend(before(run, at));
    }
    let ties: usize =
        run.cells.iter().filter(|c| c.place.buffer == Buffer::Experts).map(|c| c.near_ties.len()).sum();
    if ties > 0 {
        let widest = run.cells.iter().flat_map(|c| &c.near_ties).max_by(|a, b| a.margin.total_cmp(&b.margin));
        let margin = widest.map_or(String::new(), |tie| {
            format!(" (the widest margin {:.2e}, where the error allows {:.2e})", tie.margin, tie.limit)
        });
        let plural = if ties == 1 { "" } else { "s" };
        lines.push(format!(
            "{ties} choice{plural} of experts differ by a near tie, which is no fault{margin}"
        ));
    }
    let missing = run.cells.iter().filter(|cell| cell.status == Status::Missing).count();
    if missing > 0 {
        lines.push(format!(
            "{missing} of {} buffers are not there on both sides, and were not compared",
            run.cells.len()
        ));
    }
    lines
}

fn non_finite(run: &RunFacts, cell: &Cell) -> String {
    let place = cell.place;
    let site = place.site;
    let router_is_fine = run.cells.iter().any(|other| {
        other.place.step == place.step
            && other.place.site.layer == site.layer
            && other.place.site.stage == Stage::Route
            && other.figures.left.finite == other.figures.total
            && other.figures.right.finite == other.figures.total
    });
    match site.stage {
        Stage::Embed => "not finite from the embedding on: the table, or how it is read".into(),
        Stage::ExpertsUp | Stage::ExpertsDown if router_is_fine => {
            format!(
                "{site} is the first that is not finite, after a router that is: the experts' weights, or how they are read"
            )
        }
        Stage::Route => format!(
            "{site}, the router, is the first that is not finite: every expert after it is chosen by NaN"
        ),
        _ if site.layer == Some(0) => {
            format!(
                "{site} is the first that is not finite, in layer 0: poisoned from the start, whatever the layers' types"
            )
        }
        _ => format!("{site} is the first that is not finite; all that follows inherits it"),
    }
}

fn before(run: &RunFacts, at: usize) -> Option<String> {
    let place = run.cells[at].place;
    let layer = place.site.layer?;
    let match_so_far = run.cells[..at].iter().filter(|cell| cell.status == Status::Match).count();
    Some(match layer {
        0 => format!("nothing before layer 0 but {match_so_far} buffers that agree"),
        1 => "layer 0 agrees: the fault is layer 1's own, or of what only it has".into(),
        _ => format!(
            "layers 0 to {} agree: the fault is layer {layer}'s own, or of what they do not have",
            layer - 1
        ),
    })
}

/// Two sentences: where, and why so.
pub(crate) fn verdict(report: &Report) -> String {
    let [left, right] = [&report.sides[0].name, &report.sides[1].name];
    let buffers: usize =
        report.runs.iter().map(|run| run.cells.iter().filter(|c| c.status != Status::Missing).count()).sum();
    let Some(finding) = &report.finding else {
        let ways: Vec<_> = report.runs.iter().map(|run| run.scenario.name()).collect();
        let ways = ways.join(", ");
        return match report.outcome {
            Outcome::NonFinite => format!(
                "{left} and {right} agree, on values that are not finite. {}.",
                report.reading.first().map_or("Where they start is in the table", String::as_str)
            ),
            _ => {
                let masked = match &report.masked[..] {
                    [] => String::new(),
                    masked => format!(", but for those that were masked, of {}", masked.join(", ")),
                };
                format!(
                    "{left} and {right} agree in all {buffers} buffers that were compared{masked}. Ways of running: {ways}."
                )
            }
        };
    };
    let what = match &finding.location {
        Some(location) => located(location),
        None => "its output differs".into(),
    };
    let mut where_ =
        format!("{} is the first to differ between {left} and {right}: {what}", finding.place.site);
    if finding.place.step > 0 {
        where_ = format!("in step {}, {where_}", finding.place.step);
    }
    format!("{}. {}.", capital(&where_), capital(&why(finding)))
}

fn capital(text: &str) -> String {
    let mut chars = text.chars();
    chars.next().map_or(String::new(), |first| first.to_uppercase().chain(chars).collect())
}

fn located(location: &Location) -> String {
    let values = format!("left {}, right {}", location.left, location.right);
    let Some(first) = location.tensors.first() else {
        let place = format!(
            "{} at {:?} (token {}, position {})",
            location.buffer, location.index, location.token, location.position
        );
        return format!("{place}, {values}");
    };
    let names: Vec<String> = location.tensors.iter().map(|t| format!("`{}` ({})", t.name, t.dtype)).collect();
    format!("{}{}, {values}", names.join(" and "), inner(first))
}

/// `, expert 3, row 17, block 0, element 5`, as far as known.
fn inner(tensor: &TensorPlace) -> String {
    let parts = [
        ("expert", tensor.expert),
        ("row", tensor.row),
        ("block", tensor.block),
        ("element", tensor.element),
    ];
    let known = parts.into_iter().filter_map(|(what, n)| n.map(|n| format!(", {what} {n}")));
    known.collect()
}

fn why(finding: &Finding) -> String {
    let class = match &finding.class {
        Class::Local => "the error is local",
        Class::Inherited { .. } => "the error is inherited",
        Class::State { .. } => "the error is one of state",
    };
    let mut text = format!("{class}: {}", finding.evidence);
    if let Some(feature) = finding.features.first() {
        let (with, of) = (feature.failing_with, feature.failing);
        text += &format!(
            "; of the {among} that err {with} of {of} have {what}, of those that do not {} of {} (lift {:.1})",
            feature.passing_with,
            feature.passing,
            feature.lift,
            among = feature.among,
            what = feature.text
        );
    }
    text
}
