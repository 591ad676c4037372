//! Compares a located document with a JSON schema, so that every mistake of form has a place.
//!
//! The schemas come from the types themselves (`schemars`), of core and of each driver; whatever
//! they allow deserializes. Only the part of JSON Schema that `schemars` writes is understood;
//! what is not understood is left to the deserializer. Meaning is checked elsewhere.

use serde_json::{Map, Value};
use stillpoint_core::id::{EnvironmentName, PlatformName, PointId, RunId, StoreName};

use super::located::{Content, Node, Place};
use super::mistake::{Mistake, nearest};
use crate::secrets;

/// Collects what in `node` does not fit `schema`. `where_` names the node for people.
pub fn check(node: &Node, schema: &Value, where_: &str) -> Vec<Mistake> {
    let mut shape = Shape { root: schema, mistakes: Vec::new() };
    shape.walk(node, schema, where_);
    shape.mistakes
}

struct Shape<'a> {
    root: &'a Value,
    mistakes: Vec<Mistake>,
}

impl<'a> Shape<'a> {
    fn add(&mut self, place: Place, message: String, hint: impl Into<String>) {
        self.mistakes.push(Mistake::new(place, message, hint));
    }

    fn resolve(&self, schema: &'a Value) -> (&'a Value, Option<&'a str>) {
        match schema.get("$ref").and_then(Value::as_str) {
            Some(path) => {
                let pointer = path.trim_start_matches('#');
                (self.root.pointer(pointer).unwrap_or(&Value::Null), path.rsplit('/').next())
            }
            None => (schema, None),
        }
    }

    fn walk(&mut self, node: &Node, schema: &'a Value, where_: &str) {
        let (schema, name) = self.resolve(schema);
        if let (Some(name), Some(text)) = (name, node.text())
            && let Some(problem) = named_format(name, text)
        {
            self.mistakes.push(Mistake { place: node.place, ..problem });
            return;
        }
        if let Some(options) = schema.get("oneOf").or_else(|| schema.get("anyOf")).and_then(Value::as_array) {
            return self.walk_options(node, options, where_);
        }
        if let Some(values) = schema.get("enum").and_then(Value::as_array) {
            return self.check_enum(node, values.iter().filter_map(Value::as_str).collect(), where_);
        }
        if !self.check_type(node, schema, where_) {
            return;
        }
        match &node.content {
            Content::Map(_) => self.walk_map(node, schema, where_),
            Content::List(items) => {
                if let Some(inner) = schema.get("items") {
                    for (index, item) in items.iter().enumerate() {
                        self.walk(item, inner, &format!("{where_}[{index}]"));
                    }
                }
            }
            Content::Scalar(_) => {}
        }
    }

    fn walk_map(&mut self, node: &Node, schema: &'a Value, where_: &str) {
        let none = Map::new();
        let properties = schema.get("properties").and_then(Value::as_object);
        let known = || properties.into_iter().flat_map(Map::keys).map(String::as_str);
        let mut meant = Vec::new();
        for (key, place, value) in node.entries() {
            let at = if where_.is_empty() { key.clone() } else { format!("{where_}.{key}") };
            if let Some(inner) = properties.and_then(|p| p.get(key)) {
                self.walk(value, inner, &at);
                continue;
            }
            match schema.get("additionalProperties") {
                Some(Value::Bool(false)) => {
                    let message = format!("there is no field `{key}` in {}", shown(where_));
                    let close = nearest(key, known());
                    meant.extend(close);
                    let hint = match close {
                        Some(name) => format!("did you mean `{name}`?"),
                        None => format!("fields: {}", known().collect::<Vec<_>>().join(", ")),
                    };
                    self.add(*place, message, hint);
                }
                Some(inner @ Value::Object(_)) => self.walk(value, inner, &at),
                _ => {}
            }
        }
        for required in schema.get("required").and_then(Value::as_array).into_iter().flatten() {
            let name = required.as_str().unwrap_or_default();
            if node.get(name).is_none() && !meant.contains(&name) {
                let property = properties.unwrap_or(&none).get(name).unwrap_or(&Value::Null);
                let about = first_sentence(property).or_else(|| first_sentence(self.resolve_about(property)));
                let hint = match about {
                    Some(about) => format!("add `{name}:` {}", lower_first(about)),
                    None => format!("add `{name}:`"),
                };
                self.add(node.place, format!("{} needs the field `{name}`", shown(where_)), hint);
            }
        }
    }

    fn resolve_about(&self, schema: &Value) -> &'a Value {
        let pointer = schema.get("$ref").and_then(Value::as_str).unwrap_or("#/none").trim_start_matches('#');
        self.root.pointer(pointer).unwrap_or(&Value::Null)
    }

    /// Alternatives: an optional value, an enum whose values are described, or a tagged enum.
    fn walk_options(&mut self, node: &Node, options: &'a [Value], where_: &str) {
        let is_null = |schema: &Value| schema.get("type").and_then(Value::as_str) == Some("null");
        if options.iter().any(is_null) {
            if !matches!(node.content, Content::Scalar(Value::Null))
                && let Some(inner) = options.iter().find(|schema| !is_null(schema))
            {
                self.walk(node, inner, where_);
            }
            return;
        }
        let constants: Vec<&str> = options.iter().flat_map(constant_texts).collect();
        if !constants.is_empty() && constants.len() >= options.len() {
            return self.check_enum(node, constants, where_);
        }
        let Some(tag) = options.iter().find_map(tag_name) else { return };
        let tags: Vec<&str> = options.iter().filter_map(|option| tag_value(option, tag)).collect();
        match node.get(tag) {
            None if matches!(node.content, Content::Map(_)) => {
                let hint = format!("add `{tag}:` with one of {}", tags.join(", "));
                self.add(node.place, format!("{} needs the field `{tag}`", shown(where_)), hint);
            }
            None => self.add(
                node.place,
                format!("{} must be a mapping, not {}", shown(where_), node.what()),
                format!("begin with `{tag}:` and one of {}", tags.join(", ")),
            ),
            Some(value) => match options.iter().find(|option| tag_value(option, tag) == value.text()) {
                Some(option) if value.text().is_some() => self.walk(node, option, where_),
                _ => self.check_enum(value, tags, &format!("{where_}.{tag}")),
            },
        }
    }

    fn check_enum(&mut self, node: &Node, values: Vec<&str>, where_: &str) {
        let text = node.text();
        if text.is_some_and(|text| values.contains(&text)) {
            return;
        }
        let what = text.map_or_else(|| node.what(), |text| format!("`{text}`"));
        let hint = match text.and_then(|text| nearest(text, values.iter().copied())) {
            Some(name) => format!("did you mean `{name}`?"),
            None => format!("one of {}", values.join(", ")),
        };
        self.add(node.place, format!("{} may not be {what}", shown(where_)), hint);
    }

    fn check_type(&mut self, node: &Node, schema: &Value, where_: &str) -> bool {
        let types: Vec<&str> = match schema.get("type") {
            Some(Value::String(one)) => vec![one],
            Some(Value::Array(many)) => many.iter().filter_map(Value::as_str).collect(),
            _ => return true,
        };
        let fits = types.iter().any(|kind| type_fits(node, kind));
        if !fits {
            let wanted = types.iter().filter(|kind| **kind != "null").map(|kind| type_shown(kind)).collect::<Vec<_>>();
            let hint = type_hint(node, &types);
            self.add(
                node.place,
                format!("{} must be {}, not {}", shown(where_), wanted.join(" or "), node.what()),
                hint,
            );
        } else if schema.get("minimum").and_then(Value::as_f64) == Some(0.0)
            && let Content::Scalar(Value::Number(number)) = &node.content
            && number.as_f64().is_some_and(|number| number < 0.0)
        {
            self.add(node.place, format!("{} may not be negative", shown(where_)), "use 0 or more");
            return false;
        }
        fits
    }
}

fn shown(where_: &str) -> String {
    if where_.is_empty() { "the file".to_owned() } else { format!("`{where_}`") }
}

fn type_fits(node: &Node, kind: &str) -> bool {
    match (&node.content, kind) {
        (Content::Scalar(Value::Null), "null")
        | (Content::Scalar(Value::Bool(_)), "boolean")
        | (Content::Scalar(Value::String(_)), "string")
        | (Content::Scalar(Value::Number(_)), "number")
        | (Content::List(_), "array")
        | (Content::Map(_), "object") => true,
        (Content::Scalar(Value::Number(number)), "integer") => number.is_i64() || number.is_u64(),
        _ => false,
    }
}

fn type_shown(kind: &str) -> &'static str {
    match kind {
        "string" => "a text",
        "integer" => "a whole number",
        "number" => "a number",
        "boolean" => "true or false",
        "array" => "a list",
        "object" => "a mapping",
        _ => "something else",
    }
}

fn type_hint(node: &Node, types: &[&str]) -> String {
    match &node.content {
        Content::Scalar(Value::Number(_) | Value::Bool(_)) if types.contains(&"string") => {
            "put it in quotes to make it a text".to_owned()
        }
        Content::Scalar(Value::String(_)) if types.contains(&"integer") || types.contains(&"boolean") => {
            "write it without quotes and units".to_owned()
        }
        Content::Scalar(_) if types.contains(&"array") => {
            "write it as `[value]`, or as lines that begin with `-`".to_owned()
        }
        _ if types.contains(&"object") => "write `name: value` lines below it, indented".to_owned(),
        _ => "see the example in `stillpoint init --help`".to_owned(),
    }
}

fn constant_texts(schema: &Value) -> Vec<&str> {
    if let Some(text) = schema.get("const").and_then(Value::as_str) {
        return vec![text];
    }
    let values = schema.get("enum").and_then(Value::as_array);
    values.into_iter().flatten().filter_map(Value::as_str).collect()
}

fn tag_name(option: &Value) -> Option<&str> {
    let properties = option.get("properties")?.as_object()?;
    properties.iter().find(|(_, schema)| schema.get("const").is_some()).map(|(name, _)| name.as_str())
}

fn tag_value<'a>(option: &'a Value, tag: &str) -> Option<&'a str> {
    option.get("properties")?.get(tag)?.get("const")?.as_str()
}

/// A description up to its first full stop that ends a sentence, not an abbreviation.
fn first_sentence(schema: &Value) -> Option<&str> {
    let text = schema.get("description")?.as_str()?;
    let ends = text.match_indices(". ").find(|(at, _)| text[at + 2..].starts_with(|c: char| c.is_uppercase()));
    let sentence = ends.map_or(text, |(at, _)| &text[..at]).trim_end_matches('.');
    Some(sentence).filter(|sentence| !sentence.contains('\n'))
}

fn lower_first(text: &str) -> String {
    let mut chars = text.chars();
    let shown = match chars.next() {
        Some(first) => first.to_lowercase().collect::<String>() + chars.as_str(),
        None => String::new(),
    };
    format!("({shown})")
}

/// Checks texts whose type has rules that JSON schema does not carry.
fn named_format(name: &str, text: &str) -> Option<Mistake> {
    let invalid = match name {
        "PlatformName" => PlatformName::new(text).err(),
        "EnvironmentName" => EnvironmentName::new(text).err(),
        "StoreName" => StoreName::new(text).err(),
        "PointId" => PointId::new(text).err(),
        "RunId" => RunId::new(text).err(),
        "Secret" => secrets::check_form(text).err(),
        _ => None,
    }?;
    let hint = invalid.hint_text().unwrap_or("for example `meta-db`").to_owned();
    Some(Mistake::new(Place { line: 1, column: 1 }, invalid.message(), hint))
}
