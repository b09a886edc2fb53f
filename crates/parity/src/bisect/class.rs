//! What kind of error it is: the stage's own, inherited from a stage before it, or of the way in which it was run.

use model::{Buffer, Stage};

use super::{BisectError, Work, bench};
use crate::bench::fresh;
use crate::localise::first_wrong;
use crate::pair::Capture;
use crate::report::{Class, Finding};
use crate::scenario::Scenario;
use crate::side::Side;

impl Work<'_> {
    /// The finding where the stage is right on the left's inputs.
    pub(super) fn inherited(
        &self,
        finding: impl Fn(Class, String) -> Finding,
        sides: &[Side<'_>; 2],
        capture: &Capture,
    ) -> Finding {
        let spoiled = capture.spoiled.iter().next();
        let dump = sides.iter().any(Side::is_dump);
        let class = match spoiled {
            // Nothing was spoiled before it, and it is right: it does not err every time.
            None if !dump => {
                let evidence = "when the same steps were run once more, it agreed";
                return finding(Class::State { only: Scenario::Repeat }, evidence.into());
            }
            _ => Class::Inherited {
                spoiled_after: spoiled.map(|(_, site)| site.to_string()),
                buffer: spoiled.map(|(buffer, _)| buffer.name().into()),
            },
        };
        let evidence = match spoiled {
            Some((buffer, site)) if site.stage.writes().contains(buffer) => {
                format!("on the left's inputs the stage agrees; {buffer} is wrong since {site} wrote it")
            }
            Some((buffer, site)) => {
                format!(
                    "on the left's inputs the stage agrees; {site} changed {buffer}, which it does not write"
                )
            }
            None => {
                "on the left's inputs the stage agrees; it inherits the error of a stage that was not kept"
                    .into()
            }
        };
        finding(class, evidence)
    }

    /// The class of a stage that is wrong on the left's inputs, and how it is known.
    pub(super) fn classify(
        &self,
        scenario: Scenario,
        sides: &mut [Side<'_>; 2],
        capture: &Capture,
    ) -> Result<(Class, String), BisectError> {
        let local = |why: &str| Ok((Class::Local, why.to_owned()));
        let state = |why: String| Ok((Class::State { only: scenario }, why));
        match scenario {
            Scenario::Whole | Scenario::Dump | Scenario::Unobserved => {
                return local("on the left's inputs the stage still errs");
            }
            Scenario::Repeat => return state("the same steps agreed the first time".into()),
            _ => {}
        }
        let inside = sides[0].observe(true) & sides[1].observe(true);
        let Some(mut bench) = bench(sides, inside) else {
            return local("on the left's inputs the stage still errs");
        };
        let tokens: Vec<u32> = capture.step.rows.iter().map(|row| row.token).collect();
        let step = fresh(&tokens);
        let outputs: Vec<Buffer> = capture.left.keys().copied().collect();
        // The head wrote fewer rows than a fresh step, in which all have logits.
        if capture.site.stage == Stage::Head {
            return local("on the left's inputs the stage still errs");
        }
        let [left, right] = bench.ask(&step, capture.site, &capture.inputs, &outputs)?;
        let alone = Capture { step, left, right, ..capture.clone() };
        if first_wrong(&self.model.config, &self.judge, &alone).is_some() {
            let rows = tokens.len();
            return local(&format!(
                "alone, in a fresh step of {rows} row{}, the stage still errs",
                plural(rows)
            ));
        }
        state(format!(
            "on the same inputs, but in a step of its own, the stage agrees: it errs only {}",
            scenario.only()
        ))
    }
}

fn plural(n: usize) -> &'static str {
    if n == 1 { "" } else { "s" }
}
