//! What a file says of aliases, and how one is changed.

use std::collections::BTreeMap;

use anyhow::Context;
use pointsman_control::rollout::Sticky;
use serde::Deserialize;
use serde_json::{Value, json};

use super::{Act, Ask, Needs};
use crate::client::{rows, segment, text};

/// What a file says of an alias.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct WantedAlias {
    /// Weight by variant; none leaves the choice to the router.
    #[serde(default)]
    weights: BTreeMap<String, u32>,
    #[serde(default)]
    sticky: Sticky,
}

/// An alias that has to change, and what it is now.
struct Change {
    /// `alias.<name>`.
    subject: String,
    alias: String,
    weights: BTreeMap<String, u32>,
    sticky: Sticky,
    now: Value,
}

impl WantedAlias {
    /// What has to change.
    pub(super) fn compare(&self, alias: &str, aliases: &Value) -> anyhow::Result<Option<Box<dyn Act>>> {
        let now = view(aliases, alias)?;
        let weights = self.serving();
        let same = weights == serving(now) && (weights.is_empty() || now["sticky"] == json!(self.sticky));
        let (subject, alias, sticky) = (format!("alias.{alias}"), alias.to_owned(), self.sticky);
        let change = Change { subject, alias, weights, sticky, now: now.clone() };
        Ok((!same).then(|| Box::new(change) as _))
    }

    /// The weights that count.
    pub(super) fn serving(&self) -> BTreeMap<String, u32> {
        self.weights.iter().filter(|(_, weight)| **weight > 0).map(|(id, weight)| (id.clone(), *weight)).collect()
    }
}

/// An alias as the host shows it.
pub(super) fn view<'a>(aliases: &'a Value, alias: &str) -> anyhow::Result<&'a Value> {
    let found = rows(aliases).iter().find(|view| view["alias"] == alias);
    found.with_context(|| {
        let names: Vec<String> = rows(aliases).iter().map(|view| text(view, "alias")).collect();
        format!("the host has no such alias; it has {}", names.join(", "))
    })
}

/// The weights of an alias that count.
pub(super) fn serving(view: &Value) -> BTreeMap<String, u32> {
    let weight = |variant: &Value| u32::try_from(variant["weight"].as_u64()?).ok().filter(|weight| *weight > 0);
    let variants = view["variants"].as_array().into_iter().flatten();
    variants.filter_map(|variant| Some((text(variant, "id"), weight(variant)?))).collect()
}

impl Act for Change {
    fn subject(&self) -> &str {
        &self.subject
    }

    fn name(&self) -> String {
        format!("the alias `{}`", self.alias)
    }

    fn lines(&self) -> Vec<String> {
        let mut lines = vec![format!("~ alias {};g={}", self.alias, self.now["generation"])];
        let before = serving(&self.now);
        if before != self.weights {
            lines.push(format!("    weights  {} -> {}", json!(before), json!(self.weights)));
        }
        if !self.weights.is_empty() && self.now["sticky"] != json!(self.sticky) {
            let sticky = json!(self.sticky);
            lines.push(format!("    sticky  {} -> {}", text(&self.now, "sticky"), sticky.as_str().unwrap_or_default()));
        }
        lines
    }

    fn component(&self) -> Option<Needs<'_>> {
        None
    }

    fn check(&self, generation: u64, _: Option<&dyn Act>) -> anyhow::Result<Option<Ask>> {
        Ok(Some(self.put(generation, true)))
    }

    fn carry_out(&self, generation: u64) -> Ask {
        self.put(generation, false)
    }

    fn take_back(&self, done: &Value) -> Ask {
        let mut body = json!({ "weights": serving(&self.now), "if_generation": done["generation"] });
        if let Some(sticky) = self.now["sticky"].as_str() {
            body["sticky"] = sticky.into();
        }
        self.ask(body)
    }
}

impl Change {
    fn put(&self, generation: u64, dry_run: bool) -> Ask {
        let Self { weights, sticky, .. } = self;
        self.ask(json!({ "weights": weights, "sticky": sticky, "if_generation": generation, "dry_run": dry_run }))
    }

    fn ask(&self, body: Value) -> Ask {
        Ask { method: "PUT", path: format!("/admin/v1/aliases/{}", segment(&self.alias)), body }
    }
}
