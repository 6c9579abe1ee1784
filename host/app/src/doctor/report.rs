//! What was found, in the order in which it was: lines for a person as they come, or all of it as JSON at the end.

use std::io::Write;

use serde::Serialize;

/// How bad it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Verdict {
    /// As it should be.
    Ok,
    /// It serves, though not as somebody may think.
    Warning,
    /// It would not serve, or not what is configured.
    Fault,
}

/// One of them.
#[derive(Debug, Serialize)]
pub(super) struct Finding {
    section: &'static str,
    name: String,
    verdict: Verdict,
    found: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    remedy: Option<String>,
}

/// All of them.
pub(super) struct Report<'a> {
    findings: Vec<Finding>,
    /// Where lines go.
    out: Option<&'a mut dyn Write>,
}

// === impl Report ===

impl<'a> Report<'a> {
    pub(super) fn new(out: Option<&'a mut dyn Write>) -> Self {
        Self { findings: Vec::new(), out }
    }

    /// Something is as it should be.
    ///
    /// # Errors
    /// It cannot be printed; the same holds below.
    pub(super) fn good(&mut self, section: &'static str, name: &str, found: impl Into<String>) -> anyhow::Result<()> {
        self.add(Finding { section, name: name.into(), verdict: Verdict::Ok, found: found.into(), remedy: None })
    }

    /// It would serve, and somebody may be surprised.
    pub(super) fn warn(
        &mut self,
        section: &'static str,
        name: &str,
        found: impl Into<String>,
        remedy: &str,
    ) -> anyhow::Result<()> {
        let (name, found, remedy) = (name.into(), found.into(), Some(remedy.into()));
        self.add(Finding { section, name, verdict: Verdict::Warning, found, remedy })
    }

    /// It would not serve.
    pub(super) fn fault(
        &mut self,
        section: &'static str,
        name: &str,
        found: impl Into<String>,
        remedy: &str,
    ) -> anyhow::Result<()> {
        let (name, found, remedy) = (name.into(), found.into(), Some(remedy.into()));
        self.add(Finding { section, name, verdict: Verdict::Fault, found, remedy })
    }

    fn add(&mut self, finding: Finding) -> anyhow::Result<()> {
        if let Some(out) = &mut self.out {
            let Finding { section, name, verdict, found, remedy } = &finding;
            let verdict = match verdict {
                Verdict::Ok => "ok",
                Verdict::Warning => "WARNING",
                Verdict::Fault => "FAULT",
            };
            writeln!(out, "{verdict:<8} {section:<9} {name}: {found}")?;
            if let Some(remedy) = remedy {
                writeln!(out, "{:<18} remedy: {remedy}", "")?;
            }
            out.flush()?;
        }
        self.findings.push(finding);
        Ok(())
    }

    pub(super) fn faults(&self) -> usize {
        self.of(Verdict::Fault)
    }

    pub(super) fn warnings(&self) -> usize {
        self.of(Verdict::Warning)
    }

    fn of(&self, verdict: Verdict) -> usize {
        self.findings.iter().filter(|finding| finding.verdict == verdict).count()
    }

    pub(super) fn findings(&self) -> &[Finding] {
        &self.findings
    }
}
