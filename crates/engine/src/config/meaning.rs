//! Checks what a schema cannot say: names that must exist elsewhere, cycles, durations, addresses.
//!
//! Works on the located document, so that every mistake has a place. Opens nothing: that a path or
//! a server is there is found out by the driver.

use std::collections::{BTreeMap, BTreeSet};

use stillpoint_core::duration;
use stillpoint_core::error::Kind;
use stillpoint_core::id::{EnvironmentName, StoreName};
use stillpoint_core::platform::API_VERSION;
use stillpoint_drivers::{OpenRequest, Registration};

use super::located::Node;
use super::mistake::{Mistake, nearest};
use super::shape;
use crate::pause::names_a_secret;
use crate::secrets;

/// Parts of option names that only ever hold secrets.
const SECRET_PARTS: [&str; 6] = ["secret", "password", "token", "access_key", "account_key", "credential"];

/// Collects what is wrong beyond the form. `document` fits the schema of core.
pub fn check(document: &Node) -> Vec<Mistake> {
    let mut meaning = Meaning { mistakes: Vec::new(), stores: store_names(document) };
    meaning.api_version(document);
    meaning.bucket(document);
    meaning.stores(document);
    meaning.cut(document);
    meaning.references(document);
    meaning.pause(document);
    meaning.targets(document);
    meaning.mistakes
}

fn store_names(document: &Node) -> Vec<String> {
    let stores = document.get("stores").map(Node::entries).unwrap_or_default();
    stores.iter().map(|(name, _, _)| name.clone()).collect()
}

struct Meaning {
    mistakes: Vec<Mistake>,
    stores: Vec<String>,
}

impl Meaning {
    fn add(&mut self, node: &Node, message: impl Into<String>, hint: impl Into<String>) {
        self.mistakes.push(Mistake::new(node.place, message, hint));
    }

    fn api_version(&mut self, document: &Node) {
        if let Some(node) = document.get("apiVersion")
            && node.text() != Some(API_VERSION)
        {
            let found = node.text().unwrap_or_default();
            let message = format!("this version of stillpoint does not read apiVersion `{found}`");
            self.add(node, message, format!("write `apiVersion: {API_VERSION}`"));
        }
    }

    fn bucket(&mut self, document: &Node) {
        let Some(bucket) = document.get("bucket") else { return };
        if let Some(node) = bucket.get("url")
            && let Some(url) = node.text()
            && let Err((message, hint)) = bucket_url(url)
        {
            self.add(node, message, hint);
        }
        for (name, place, _) in bucket.get("options").map(Node::entries).unwrap_or_default() {
            let lower = name.to_lowercase();
            if SECRET_PARTS.iter().any(|part| lower.contains(part)) {
                let message = format!("`{name}` is a secret and may not stand under `bucket.options`");
                let hint = format!("move it to `bucket.credentials`, as `{name}: env:NAME`");
                self.mistakes.push(Mistake::new(*place, message, hint));
            }
        }
    }

    fn stores(&mut self, document: &Node) {
        let Some(stores) = document.get("stores") else { return };
        if stores.entries().is_empty() {
            self.add(stores, "there is no store to protect", "add one below `stores:`, or let `stillpoint init` look");
        }
        for (name, place, store) in stores.entries() {
            if let Err(error) = StoreName::new(name.as_str()) {
                self.mistakes.push(Mistake::new(*place, error.message(), "for example `meta-db`"));
            }
            self.store(name, store);
        }
        self.cycles(stores);
    }

    fn store(&mut self, name: &str, store: &Node) {
        for need in store.get("needs").map(Node::items).unwrap_or_default() {
            self.known_store(need, "needs");
            if need.text() == Some(name) {
                self.add(need, format!("store `{name}` needs itself"), "remove it");
            }
        }
        let Some(node) = store.get("driver") else { return };
        let driver = node.text().unwrap_or_default();
        match stillpoint_drivers::find(driver) {
            Ok(registration) => {
                let schema = (registration.schema)().to_value();
                let settings = settings_of(store);
                let path = format!("stores.{name}");
                let found = shape::check(&settings, &schema, &path);
                if found.is_empty() {
                    self.open(name, store, &settings, registration);
                }
                self.mistakes.extend(found);
            }
            Err(error) => {
                let known = stillpoint_drivers::REGISTRY.iter().map(|registration| registration.name);
                let hint = match nearest(driver, known) {
                    Some(close) => format!("did you mean `{close}`?"),
                    None => error.hint_text().unwrap_or("`stillpoint driver list` names them").to_owned(),
                };
                self.add(node, error.message(), hint);
            }
        }
    }

    /// Lets the driver look at its settings together. Opening a driver touches no store; secrets are
    /// not resolved for it.
    fn open(&mut self, name: &str, store: &Node, settings: &Node, registration: &Registration) {
        let (Ok(store_name), Ok(settings)) = (StoreName::new(name), serde_json::from_value(settings.to_value())) else {
            return;
        };
        let request = OpenRequest {
            store: &store_name,
            settings: &settings,
            scratch: std::env::temp_dir(),
            kept: std::env::temp_dir(),
            secrets: &|_| Ok("not resolved yet".to_owned()),
        };
        if let Err(error) = (registration.open)(&request)
            && error.kind() == Kind::Config
        {
            let hint = error.hint_text().unwrap_or("`stillpoint driver policy NAME` explains the settings").to_owned();
            self.add(store, format!("store `{name}`: {}", error.message()), hint);
        }
    }

    fn known_store(&mut self, node: &Node, field: &str) {
        let Some(text) = node.text() else { return };
        if self.stores.iter().any(|name| name == text) {
            return;
        }
        let hint = match nearest(text, self.stores.iter().map(String::as_str)) {
            Some(close) => format!("did you mean `{close}`?"),
            None => format!("stores: {}", self.stores.join(", ")),
        };
        self.add(node, format!("`{field}` names the store `{text}`, which is not under `stores`"), hint);
    }

    /// Reports each store that is on a circle of `needs`, once per circle.
    fn cycles(&mut self, stores: &Node) {
        let needs: BTreeMap<&str, Vec<&Node>> = stores
            .entries()
            .iter()
            .map(|(name, _, store)| (name.as_str(), store.get("needs").map(Node::items).unwrap_or_default()))
            .map(|(name, items)| (name, items.iter().filter(|item| item.text() != Some(name)).collect()))
            .collect();
        let mut done = BTreeSet::new();
        for start in needs.keys() {
            let mut path = Vec::new();
            if let Some((circle, node)) = find_circle(start, &needs, &mut done, &mut path) {
                let message = format!("stores need each other in a circle: {circle}");
                self.add(node, message, "remove one of these `needs`; a restore must begin somewhere");
            }
        }
    }

    fn cut(&mut self, document: &Node) {
        let fields = [("cut", "pauseBudget"), ("retention", "within")];
        for (section, field) in fields {
            let node = document.get(section).and_then(|section| section.get(field));
            if let Some(node) = node
                && let Some(text) = node.text()
                && let Err(error) = duration::parse(text)
            {
                self.add(node, format!("`{section}.{field}`: {}", error.message()), "for example 800ms, 5s, 36h or 7d");
            }
        }
        let cursors = document.get("cut").and_then(|cut| cut.get("cursors")).map(Node::items).unwrap_or_default();
        for cursor in cursors {
            for field in ["cursor", "sink"] {
                if let Some(node) = cursor.get(field) {
                    self.known_store(node, field);
                }
            }
        }
    }

    fn references(&mut self, document: &Node) {
        for reference in document.get("references").map(Node::items).unwrap_or_default() {
            for field in ["from", "to"] {
                if let Some(node) = reference.get(field) {
                    self.known_store(node, field);
                }
            }
            if let Some(query) = reference.get("query")
                && query.text().is_some_and(|text| text.trim().is_empty())
            {
                self.add(query, "the query of a reference is empty", "for example `SELECT object_key FROM models`");
            }
        }
    }

    fn pause(&mut self, document: &Node) {
        for step in document.get("pause").map(Node::items).unwrap_or_default() {
            if let Some(store) = step.get("store") {
                self.known_store(store, "store");
            }
            for side in ["pause", "resume"].iter().filter_map(|side| step.get(side)) {
                if step.get("kind").and_then(Node::text) == Some("command") && side.items().is_empty() {
                    self.add(side, "a pause step names no program", "for example `[systemctl, stop, writer]`");
                }
                self.http_call(side);
            }
        }
    }

    fn http_call(&mut self, call: &Node) {
        if let Some(node) = call.get("url")
            && !node.text().is_some_and(|url| url.starts_with("http://") || url.starts_with("https://"))
        {
            self.add(
                node,
                "the address of a pause step must begin with http:// or https://",
                "for example http://127.0.0.1:8080/pause",
            );
        }
        if let Some(node) = call.get("url")
            && let Some(url) = node.text()
        {
            self.hook_url(node, url);
        }
        for (name, _, value) in call.get("headers").map(Node::entries).unwrap_or_default() {
            if names_a_secret(name) && !value.text().is_some_and(secrets::is_reference) {
                let message = format!("the header `{name}` holds a secret, which may not stand here in plain text");
                self.add(value, message, "write `env:NAME`, `file:/path` or `command:program arguments`");
            }
        }
    }

    /// An address is shown, journalled and copied: no secret may be part of it.
    fn hook_url(&mut self, node: &Node, url: &str) {
        let authority = url.split_once("://").map_or("", |(_, rest)| rest.split(['/', '?', '#']).next().unwrap_or(""));
        if authority.contains('@') {
            let hint = "send them in a header: `headers: { Authorization: env:NAME }`";
            self.add(node, "the address of a pause step may not hold a user or a password", hint);
        }
        let Ok(url) = url::Url::parse(url) else { return };
        for (name, value) in url.query_pairs() {
            if names_a_secret(&name) && !secrets::is_reference(&value) {
                let message = format!("the parameter `{name}` holds a secret, which may not stand here in plain text");
                self.add(node, message, format!("write `{name}=env:NAME`, or send it in a header"));
            }
        }
    }

    fn targets(&mut self, document: &Node) {
        let own = document.get("environment").and_then(Node::text);
        for (name, place, target) in document.get("targets").map(Node::entries).unwrap_or_default() {
            if let Err(error) = EnvironmentName::new(name.as_str()) {
                self.mistakes.push(Mistake::new(*place, error.message(), "for example `staging`"));
            }
            if own == Some(name.as_str()) {
                let message = format!("the target `{name}` has the name of the environment it is kept away from");
                self.mistakes.push(Mistake::new(
                    *place,
                    message,
                    "give the target a name of its own, such as `staging`",
                ));
            }
            for (store, place, _) in target.get("stores").map(Node::entries).unwrap_or_default() {
                self.known_store(&text_node(store, *place), &format!("targets.{name}"));
            }
        }
    }
}

fn text_node(text: &str, place: super::located::Place) -> Node {
    Node { place, content: super::located::Content::Scalar(serde_json::Value::String(text.to_owned())) }
}

/// The driver's own settings: everything but what every store has.
fn settings_of(store: &Node) -> Node {
    let entries = store.entries().iter().filter(|(key, _, _)| key != "driver" && key != "needs");
    Node { place: store.place, content: super::located::Content::Map(entries.cloned().collect()) }
}

fn find_circle<'a>(
    name: &'a str,
    needs: &BTreeMap<&'a str, Vec<&'a Node>>,
    done: &mut BTreeSet<&'a str>,
    path: &mut Vec<&'a str>,
) -> Option<(String, &'a Node)> {
    if !done.insert(name) {
        return None;
    }
    path.push(name);
    for node in needs.get(name).into_iter().flatten() {
        let next = node.text().unwrap_or_default();
        if let Some(begin) = path.iter().position(|on| *on == next) {
            let mut circle = path[begin..].to_vec();
            circle.push(next);
            return Some((circle.join(" → "), node));
        }
        if let Some(found) = find_circle(next, needs, done, path) {
            return Some(found);
        }
    }
    path.pop();
    None
}

fn bucket_url(url: &str) -> Result<(), (String, String)> {
    let examples = "for example /srv/backup, s3://bucket/prefix, gs://bucket/prefix or az://container/prefix";
    if url.starts_with('/') {
        return Ok(());
    }
    let Some((scheme, rest)) = url.split_once("://") else {
        return Err((format!("`{url}` is not an absolute path or an address"), examples.to_owned()));
    };
    if rest.split('/').next().is_some_and(|host| host.contains('@')) {
        let hint = "put access keys under `bucket.credentials`, as `env:NAME`";
        return Err(("the address of the bucket may not hold credentials".to_owned(), hint.to_owned()));
    }
    match scheme {
        "file" if rest.starts_with('/') => Ok(()),
        "file" => {
            Err((format!("`{url}` is not an absolute path"), "write three slashes: file:///srv/backup".to_owned()))
        }
        "s3" | "gs" | "az" if rest.trim_matches('/').is_empty() => {
            Err((format!("`{url}` names no bucket"), examples.to_owned()))
        }
        "s3" | "gs" | "az" => Ok(()),
        _ => Err((format!("there is no kind of bucket `{scheme}`"), examples.to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bucket_addresses_hold_no_credentials() {
        for good in ["/srv/b", "file:///srv/b", "s3://b", "gs://b/p", "az://c/p"] {
            assert!(bucket_url(good).is_ok(), "{good}");
        }
        for bad in ["srv/b", "./b", "file://srv/b", "s3://", "ftp://x/y", "s3://key:pw@b/p"] {
            assert!(bucket_url(bad).is_err(), "{bad}");
        }
        let (message, hint) = bucket_url("s3://key:pw@b/p").expect_err("refused");
        assert!(!message.contains("pw") && !hint.contains("pw"));
    }
}
