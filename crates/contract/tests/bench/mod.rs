//! A contract, and checks whose outcome a test decides.
#![allow(dead_code, reason = "each test file uses a part")]

use contract::{
    CheckCall, CheckSpec, Checks, Figures, Ground, Kind, Miss, ParameterSpec, Parameters, Part, PlantedFault,
    Provenance, Source, Verdict,
};

pub(crate) const CONTRACT: &str = "\
id: thing-v1
version: 2
governs: A thing.
real_shape: large
invariants:
  - id: finite
    words: Every number is finite.
    formula: isfinite(x)
  - id: equal
    words: Both are equal.
    formula: a = b
falsifiers:
  - id: F-FINITE
    refutes: [finite]
    check:
      name: finite
      parameters: { tokens: 3 }
      fault: nan
    prediction: Every number is finite.
    if_it_fails: Something overflows.
  - id: F-EQUAL
    refutes: [equal]
    check: { name: equal, parameters: { device: gpu, within: 1e-6 }, fault: ulp }
    prediction: They are equal.
    if_it_fails: A kernel is wrong.
  - id: F-LATER
    refutes: [equal]
    prediction: It will be.
    if_it_fails: It will not.
stages:
  - name: begun
    what: Something holds.
    shown_by: [F-FINITE]
  - name: done
    what: Everything holds.
    shown_by: [F-FINITE, F-EQUAL, F-LATER]
amendments:
  - version: 2
    date: 2026-11-23
    what: Equality.
";

pub(crate) fn source(text: &str) -> Source {
    contract::read("thing-v1.yaml", text).unwrap_or_else(|finding| panic!("{finding}"))
}

const TOKENS: ParameterSpec =
    ParameterSpec { name: "tokens", kind: Kind::Integer, about: "How many.", required: true };
const WITHIN: ParameterSpec =
    ParameterSpec { name: "within", kind: Kind::Number, about: "Bound.", required: false };
const DEVICE: ParameterSpec =
    ParameterSpec { name: "device", kind: Kind::Text, about: "Where.", required: false };

pub(crate) const SPECS: [CheckSpec; 3] = [
    CheckSpec {
        name: "finite",
        about: "Looks at every number.",
        parameters: &[TOKENS],
        faults: &[PlantedFault { name: "nan", about: "A NaN." }],
        parts: &[Part::Model, Part::Arithmetic],
    },
    CheckSpec {
        name: "equal",
        about: "Compares.",
        parameters: &[DEVICE, WITHIN],
        faults: &[PlantedFault { name: "ulp", about: "A bit." }],
        parts: &[Part::Model, Part::Arithmetic],
    },
    CheckSpec {
        name: "table",
        about: "Looks things up.",
        parameters: &[],
        faults: &[PlantedFault { name: "typo", about: "A wrong entry." }],
        parts: &[],
    },
];

/// Checks that hold unless a fault is planted; `equal` needs a GPU.
pub(crate) struct Fake {
    pub(crate) ground: Ground,
    pub(crate) shape: &'static str,
    /// Whether `finite` fails by itself.
    pub(crate) broken: bool,
    /// Whether planted faults are overlooked.
    pub(crate) blind: bool,
    /// Whether nothing is measured.
    pub(crate) silent: bool,
}

impl Default for Fake {
    fn default() -> Fake {
        Fake { ground: Ground::Ci, shape: "small", broken: false, blind: false, silent: false }
    }
}

impl Checks for Fake {
    fn specs(&self) -> Vec<CheckSpec> {
        SPECS.to_vec()
    }

    fn run(&mut self, spec: &CheckSpec, parameters: &Parameters, fault: Option<&str>) -> Verdict {
        if parameters.text("device") == Some("gpu") && self.ground == Ground::Ci {
            return Err(Miss::unable("needs a GPU: pass --device cuda"));
        }
        if fault.is_some() && !self.blind || self.broken && spec.name == "finite" {
            return Err(Miss::failed("value 3 is NaN"));
        }
        let mut figures = Figures::new();
        if !self.silent {
            figures.insert("values".into(), 1000.into());
            figures.insert("cosine".into(), 0.1f64.sin().into());
        }
        Ok(figures)
    }

    fn provenance(&mut self, _: &CheckSpec, _: &CheckCall) -> Result<Provenance, Miss> {
        let on_gpu = self.ground == Ground::Gpu;
        Ok(Provenance {
            r#where: self.ground,
            gpu: on_gpu.then(|| "G1".into()),
            driver: on_gpu.then(|| "13.0".into()),
            nvrtc: on_gpu.then(|| "13.0".into()),
            kernel_hash: "k1".into(),
            model: Some(self.shape.into()),
            model_hash: Some("m1".into()),
            shape: (self.shape == "large").then(|| self.shape.into()),
            arithmetic: "a1".into(),
        })
    }
}
